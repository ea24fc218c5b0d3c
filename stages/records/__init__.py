"""The contract between the stages: record, shard, manifest, dataset, storage. Nothing here knows a model."""
