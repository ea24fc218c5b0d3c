"""The stages of the pipeline: generation, training and evaluation, and the contracts between them."""

import os

# Read by ray when it is imported: its workers keep the devices that they see, and nothing is sent home.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
