"""The stages of the pipeline: generation, training and evaluation, and the contracts between them."""
