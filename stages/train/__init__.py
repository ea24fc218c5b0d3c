"""Stage 2: fit an adapter to a dataset's records. Training streams them and never loads the teacher pipeline."""
