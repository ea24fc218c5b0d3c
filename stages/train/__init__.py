"""Stage 2: stream a dataset's records and fit an adapter to them. The teacher is never run, nor even loaded."""
