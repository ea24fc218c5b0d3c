from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.selection import FEW_HELD_OUT, SelectedSample, choose_denoiser, hold_out, remarks, select
from stages.train.trainer import Trainer
from stages.train.window import load
from tests.conftest import generate, generate_config, train_config


def selected(dataset: Dataset, **changes: Any) -> tuple[list[SelectedSample], list[SelectedSample]]:
    return select(dataset, train_config(dataset.root, Path("unused"), **{"validation_share": 0.25} | changes))


def trajectories(samples: list[SelectedSample]) -> set[int]:
    return {sample.row["trajectory"] for sample in samples}


def test_whole_trajectories_are_held_out(dataset: Dataset) -> None:
    training, validation = hold_out(dataset.manifest, 0.25, seed=0)
    one, other = set(training["trajectory"].to_pylist()), set(validation["trajectory"].to_pylist())
    assert (len(one), len(other), len(one | other)) == (9, 3, 12)
    assert hold_out(dataset.manifest, 0.25, seed=0)[1].equals(validation)
    assert not hold_out(dataset.manifest, 0.25, seed=1)[1].equals(validation)


def test_a_single_held_out_trajectory_becomes_a_few(dataset: Dataset) -> None:
    assert len(trajectories(selected(dataset, validation_share=0.05)[1])) == FEW_HELD_OUT
    assert len(set(hold_out(dataset.manifest.slice(0, 2), 0.05, seed=0)[1]["trajectory"].to_pylist())) == 1


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        (
            {"validation_share": 0.05},
            ["validation: 4 trajectories are held out; validation_share=0.05 gives 1, which is too few to judge by"],
        ),
        (
            {"filters": [["trajectory", "not in", [0, 7]]]},
            ["validation: a single trajectory, whose loss says little: raise"],
        ),
        ({"scale_range": [1.0, 9.0]}, ["scale_range=[1.0, 9.0]: the dataset has scales 1 to 6, and trains no others"]),
    ],
)
def test_a_selection_that_is_not_as_asked_is_told(dataset: Dataset, changes: Any, lines: list[str]) -> None:
    config = train_config(dataset.root, Path("unused"), **{"validation_share": 0.25} | changes)
    found = remarks(dataset, select(dataset, config)[1], config)
    assert [line.startswith(start) for line, start in zip(found, lines, strict=True)] == [True] * len(lines)


def test_by_default_every_record_is_read(dataset: Dataset) -> None:
    training, validation = selected(dataset)
    assert sum(sample.records for sample in training + validation) == 48


def test_runs_on_fewer_trajectories_validate_with_the_same_ones(dataset: Dataset) -> None:
    whole, held = selected(dataset)
    training, validation = selected(dataset, max_trajectories=4)
    assert sorted(trajectories(training)) == sorted(trajectories(whole))[:4]
    assert validation == held


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"scale_range": [2.0, 4.5]}, lambda row: 2.0 <= row["scale"] <= 4.5),
        ({"filters": [["class_label", "in", [0, 1, 2, 3, 4]]]}, lambda row: row["class_label"] < 5),
        ({"filters": [["class_label", "!=", 3], ["scale", ">", 2]]}, lambda row: row["class_label"] != 3 and row["scale"] > 2),
    ],
)  # fmt: skip
def test_samples_are_chosen_by_their_row_of_the_manifest(
    dataset: Dataset, changes: Any, kept: Callable[[dict[str, Any]], bool]
) -> None:
    for some, whole in zip(selected(dataset, **changes), selected(dataset), strict=True):
        assert some == [sample for sample in whole if kept(sample.row)]
        assert 0 < len(some) < len(whole)


def test_records_are_chosen_by_their_timestep(dataset: Dataset) -> None:
    training, _ = selected(dataset, timestep_range=[300, 800])
    everything = load(dataset, selected(dataset)[0])
    wanted = (everything.records.timestep >= 300) & (everything.records.timestep <= 800)
    window = load(dataset, training)
    assert 0 < len(window) < len(everything)
    assert sum(sample.records for sample in training) == len(window)
    assert torch.equal(window.records.timestep, everything.records.timestep[wanted])
    assert torch.equal(window.records.latent, everything.records.latent[wanted])
    whole = window.take(torch.arange(len(window)))
    assert torch.equal(whole.cond["class_labels"], everything.take(wanted.nonzero().flatten()).cond["class_labels"])


def test_the_timesteps_of_a_sample_are_read_alone(dataset: Dataset) -> None:
    for row in dataset.manifest.to_pylist():
        assert torch.equal(dataset.timesteps(row), load(dataset, [SelectedSample(row)]).records.timestep)


def test_selection_leaves_a_missing_shard_to_the_stream_if_damage_is_skipped(damaged: Path) -> None:
    row = Dataset(damaged).manifest.to_pylist()[0]
    (damaged / row["shard"]).unlink()
    dataset = Dataset(damaged, check_sizes=False)
    with pytest.raises(UserError, match="no such file"):
        selected(dataset, timestep_range=[300, 800])
    parts = selected(dataset, timestep_range=[300, 800], on_damage="skip")
    assert any(sample == SelectedSample(row) for part in parts for sample in part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scale_range": [50.0, 60.0]},
            r"scale_range=\[50.0, 60.0\]: no record of .* has such a scale: they are 1.19 to 5.47",
        ),
        ({"timestep_range": [2000, 3000]}, "no record is left to train on: widen timestep_range$"),
        ({"filters": [["scale", ">", 9]]}, "no record is left to train on: widen filters$"),
        (
            {"filters": [["trajectory", "in", [2, 3]]], "validation_share": 0.2},
            "left to validate with: none of the 2 held-out trajectories has one: raise validation_share=0.2, or widen",
        ),
        ({"validation_share": 0.99}, "no record is left to train on: change validation_share=0.99$"),
        ({"scale_range": [3.0]}, r"scale_range=\[3.0\]: give \[LOW,HIGH\]"),
        ({"timestep_range": [9, 1]}, r"timestep_range=\[9, 1\]: give \[LOW,HIGH\]"),
        (
            {"filters": [["colour", "=", 1]]},
            "filters=.*colour.*: give each as .* with a column of the manifest: shard,",
        ),
        ({"filters": [["scale", "~", 1]]}, "filters=.*: give each as"),
        ({"filters": ["scale"]}, "filters=.*: give each as"),
        ({"filters": [1]}, "filters=.*: give each as"),
        ({"filters": [["scale", ">", "big"]]}, "filters=.*: give each as"),
    ],
)
def test_an_invalid_selection_is_named(dataset: Dataset, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        selected(dataset, **{"validation_share": 0.1} | changes)


def test_an_adapter_records_its_restricted_scales(dataset: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(train_config(dataset.root, tmp_path, scale_range=[2.0, 9.0], validation_share=0.4))
    assert trainer.adapter.metadata.scale_range == [2.0, 6.0]


def test_an_adapter_records_the_scales_that_a_filter_left(dataset: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(train_config(dataset.root, tmp_path, filters=[["scale", "<", 4.0]], validation_share=0.4))
    low, high = trainer.adapter.metadata.scale_range
    assert 1.0 <= low < high < 4.0


def test_a_single_trajectory_cannot_be_trained_on(tiny_teacher: Path, tmp_path: Path) -> None:
    one = Dataset(generate(generate_config(tiny_teacher, tmp_path, num_trajectories=1)))
    with pytest.raises(UserError, match=r"holds a single trajectory, .*: generate more of them \(num_trajectories\)$"):
        selected(one)


def test_one_of_several_denoisers_is_selected(dataset: Dataset, tmp_path: Path) -> None:
    config = train_config(dataset.root.where("."), tmp_path)
    assert choose_denoiser(dataset, config) == "transformer"
    names = pa.array(["transformer", "transformer_2"] * (len(dataset.manifest) // 2))
    dataset.manifest = dataset.manifest.set_column(dataset.manifest.column_names.index("denoiser"), "denoiser", names)
    with pytest.raises(UserError, match="denoiser=None: .* say denoiser=transformer or denoiser=transformer_2"):
        select(dataset, config)
    config.denoiser = "transformer_3"
    with pytest.raises(UserError, match="denoiser=transformer_3: the teacher has no such denoiser"):
        select(dataset, config)
    config.denoiser = "transformer_2"
    assert {sample.row["denoiser"] for part in select(dataset, config) for sample in part} == {"transformer_2"}
