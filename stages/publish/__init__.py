"""Datasets and adapters on their way to a hub."""
