from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from stages.records.dataset import Dataset, read_commits
from stages.records.manifest import SCHEMA, decode_manifest, encode_manifest, table_of


def test_one_row_per_sample_with_the_provenance_of_each(dataset: Dataset) -> None:
    assert dataset.manifest.schema == SCHEMA
    rows = dataset.manifest.to_pylist()
    assert [row["trajectory"] for row in rows] == list(range(12))
    assert all(row["records"] == 4 for row in rows)
    assert all(1 <= row["scale"] <= 6 and 0 <= row["timestep_min"] < row["timestep_max"] < 1000 for row in rows)
    assert [row["class_label"] for row in rows] == [*range(10), 0, 1]


def test_any_parquet_reader_reads_what_was_written(tmp_path: Path, dataset: Dataset) -> None:
    commits = list(read_commits(dataset.root))
    (tmp_path / "manifest.parquet").write_bytes(encode_manifest(table_of(commits)))
    assert pq.read_table(tmp_path / "manifest.parquet").equals(dataset.manifest)
    assert decode_manifest((tmp_path / "manifest.parquet").read_bytes()).equals(dataset.manifest)
