"""The contract between the stages: records, shards, manifest, dataset. Nothing here depends on a model."""
