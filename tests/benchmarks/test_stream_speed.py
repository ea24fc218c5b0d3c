from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from stages.train.batch import Batch
from tests.benchmarks.stream_speed import main, reference_batches, stream_batches, write_dataset, write_folders

SHAPE = (4, 2, 2)


def test_the_measurement_runs_at_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    main("6", "1")
    info = json.loads(capsys.readouterr().out)["by_record_size"]
    assert [one["records"] for one in info.values()] == [120, 480]
    for one in info.values():
        assert set(one["microseconds_by_part"]) == {"read", "crc32", "decode", "place", "gather"}
        assert one["reference"]["records_per_second"] > 0
        for stream in one["stream_by_window"].values():
            assert set(stream) == {"records_per_second", "records_per_cpu_second", "first_epoch", "times_reference"}
            assert min(stream.values()) > 0


def test_both_loaders_yield_every_record_once(tmp_path: Path) -> None:
    dataset, folders = write_dataset(tmp_path / "dataset", 16, SHAPE), write_folders(tmp_path / "folders", 16, SHAPE)
    epochs = [list(islice(stream_batches(dataset, 1 << 20), 5)), list(reference_batches(folders))]
    ours, theirs = (records(batches) for batches in epochs)
    assert len(ours) == 320
    assert ours == theirs
    assert set(Counter((scale, step) for scale, step, *_ in ours).values()) == {1}


def records(batches: list[Batch]) -> list[tuple[float, int, int, list[float], list[float]]]:
    return sorted(
        (scale, step, label, latent, target)
        for batch in batches
        for scale, step, label, latent, target in zip(
            batch.scale.tolist(),
            batch.timestep.tolist(),
            batch.cond["class_labels"].tolist(),
            batch.latent.flatten(1).tolist(),
            batch.target.flatten(1).tolist(),
            strict=True,
        )
    )
