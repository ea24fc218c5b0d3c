from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.records.commits import read_commits
from stages.records.dataset import Dataset
from stages.records.manifest import SCHEMA, decode_manifest, encode_manifest, fingerprint, table_of


def test_each_sample_has_a_row_with_its_provenance(dataset: Dataset) -> None:
    assert dataset.manifest.schema == SCHEMA
    rows = dataset.manifest.to_pylist()
    assert [row["trajectory"] for row in rows] == list(range(12))
    assert all(row["records"] == 4 for row in rows)
    assert all(1 <= row["scale"] <= 6 and 0 <= row["timestep_min"] < row["timestep_max"] < 1000 for row in rows)
    assert [row["class_label"] for row in rows] == [*range(10), 0, 1]


def test_any_parquet_reader_reads_the_manifest(tmp_path: Path, dataset: Dataset) -> None:
    commits = list(read_commits(dataset.root))
    (tmp_path / "manifest.parquet").write_bytes(encode_manifest(table_of(commits)))
    assert pq.read_table(tmp_path / "manifest.parquet").equals(dataset.manifest)
    assert decode_manifest((tmp_path / "manifest.parquet").read_bytes()).equals(dataset.manifest)


def test_a_fingerprint_depends_on_contents_and_not_on_paths(dataset: Dataset) -> None:
    table = dataset.manifest
    assert fingerprint(table) == dataset.fingerprint

    def changed(name: str, change: Callable[[Any], Any]) -> pa.Table:
        place = SCHEMA.get_field_index(name)
        values = pa.array([change(value) for value in table[name].to_pylist()], SCHEMA.field(name).type)
        return table.set_column(place, SCHEMA.field(name), values)

    for same in (
        changed("shard", lambda name: name.replace("-", "-0")),
        changed("shard_sha256", lambda _: "other"),
        changed("shard_size", lambda size: size + 512),
        changed("offset", lambda offset: offset + 512),
    ):
        assert fingerprint(same) == dataset.fingerprint
    for other in (
        changed("shard", lambda _: "shards/00000-1a2b3c4d.tar"),
        changed("checksum", lambda value: value ^ 1),
        changed("scale", lambda scale: scale + 1),
        changed("prompt", lambda _: "a three"),
        table.slice(0, 11),
        table.take(list(range(11, -1, -1))),
    ):
        assert fingerprint(other) != dataset.fingerprint
