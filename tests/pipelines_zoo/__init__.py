"""Guided pipelines of diffusers, each tiny and made without a download."""
