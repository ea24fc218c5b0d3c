"""Evaluation: one pass with the adapter against two guided passes and against no guidance, from the same noise."""
