"""Evaluation: the adapter against guidance in two passes and against none, on the same noise."""
