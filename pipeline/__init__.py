"""The commands: parse, compose, run."""
