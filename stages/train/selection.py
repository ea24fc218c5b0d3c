"""Which records of a dataset a run trains on, and which it is judged by: an ablation needs no new data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.base.loading import first_line
from stages.errors import DamageError, UserError
from stages.records.dataset import Dataset
from stages.train.config import TrainConfig

Row = dict[str, Any]  # of the manifest


@dataclass(frozen=True)
class SelectedSample:
    """A sample to read, or some of its records.

    Attributes:
        row: of the manifest.
        chosen: the numbers of the records to use; None for all.
    """

    row: Row
    chosen: Sequence[int] | None = None

    @property
    def records(self) -> int:
        return self.row["records"] if self.chosen is None else len(self.chosen)

    @property
    def name(self) -> str:
        return f"{self.row['shard']} {self.row['key']}"


def select(dataset: Dataset, config: TrainConfig) -> tuple[list[SelectedSample], list[SelectedSample]]:
    """(training, validation): the samples to read, and of each the records in `timestep_range`.

    The trajectories that are held out follow from the seed and the whole manifest, so that runs on parts of a dataset are
    judged by the same ones.

    Raises:
        UserError: a filter is none, or nothing is left.
    """
    manifest = dataset.manifest.filter(pc.field("denoiser") == choose_denoiser(dataset, config))
    held_out = hold_out(manifest, config.validation_share, config.seed)
    training, validation = (matching(table, config) for table in held_out)
    if config.max_trajectories is not None:
        first = np.unique(training["trajectory"].to_numpy())[: config.max_trajectories]
        training = training.filter(pc.field("trajectory").isin(first))
    parts = tuple(list(in_timestep_range(dataset, table, config)) for table in (training, validation))
    if not all(parts) and pc.count_distinct(dataset.manifest["trajectory"]).as_py() < 2:
        raise UserError(
            f"{dataset.root}: holds a single trajectory, and one is held out to validate with: generate more of them "
            "(num_trajectories)"
        )
    for samples, purpose in zip(parts, ("train on", "validate with"), strict=True):
        if not samples:
            raise UserError(
                f"{dataset.root}: nothing is left to {purpose}: change validation_share={config.validation_share:g}, or widen "
                "scale_range, timestep_range, max_trajectories or filters"
            )
    return parts[0], parts[1]


def choose_denoiser(dataset: Dataset, config: TrainConfig) -> str:
    """The denoiser that an adapter is trained for, by its name in the pipeline.

    Raises:
        UserError: the teacher has several, or has none of that name.
    """
    known = sorted(dataset.manifest["denoiser"].unique().to_pylist())
    if config.denoiser is None and len(known) == 1:
        return known[0]
    if config.denoiser is None or config.denoiser not in known:
        message = (
            "several denoisers, each of which needs an adapter of its own" if config.denoiser is None else "no such one"
        )
        raise UserError(
            f"denoiser={config.denoiser}: the teacher has {message}: say denoiser={' or denoiser='.join(known)}"
        )
    return config.denoiser


def hold_out(manifest: pa.Table, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """(training, validation): whole trajectories are held out, because the records of one resemble each other."""
    trajectories = np.unique(manifest["trajectory"].to_numpy())
    count = max(1, round(share * len(trajectories)))
    chosen = np.random.default_rng([seed, 1]).permutation(trajectories)[:count]
    held = np.isin(manifest["trajectory"].to_numpy(), chosen)
    return manifest.filter(pa.array(~held)), manifest.filter(pa.array(held))


def matching(table: pa.Table, config: TrainConfig) -> pa.Table:
    """The rows with a scale in `scale_range` that pass `filters`, a conjunction as Parquet readers take it."""
    conditions: list[Any] = []
    if config.scale_range is not None:
        low, high = interval("scale_range", config.scale_range)
        conditions += [("scale", ">=", low), ("scale", "<=", high)]
    if not conditions and not config.filters:
        return table
    try:
        conditions += [tuple(condition) for condition in config.filters or []]
        return table.filter(pq.filters_to_expression(conditions))
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"filters={config.filters}: {first_line(error)}: each is [column, operator, value] with a column of the manifest: "
            f"{', '.join(table.column_names)}"
        ) from error


def trained_scales(samples: list[SelectedSample], config: TrainConfig) -> list[float] | None:
    """The lowest and the highest scale that a run was restricted to; None where it trains on all that the dataset has."""
    if config.filters:
        scales = [sample.row["scale"] for sample in samples]
        return [min(scales), max(scales)]
    return config.scale_range


def interval(name: str, value: list[float]) -> tuple[float, float]:
    if len(value) != 2 or not value[0] <= value[1]:
        raise UserError(f"{name}={value}: say [LOW,HIGH], with the lower number first")
    return value[0], value[1]


def in_timestep_range(dataset: Dataset, table: pa.Table, config: TrainConfig) -> Iterator[SelectedSample]:
    """The samples with records at timesteps in `timestep_range`, as the denoiser is given them, both ends among them."""
    if config.timestep_range is None:
        yield from map(SelectedSample, table.to_pylist())
        return
    low, high = interval("timestep_range", config.timestep_range)
    for row in table.to_pylist():
        if low <= row["timestep_min"] and row["timestep_max"] <= high:
            yield SelectedSample(row)
        elif row["timestep_min"] <= high and low <= row["timestep_max"]:
            try:
                timesteps = dataset.timesteps(row).tolist()
            except DamageError:
                if config.on_damage == "stop":
                    raise
                yield SelectedSample(row)  # reading its records reports the damage
                continue
            chosen = [i for i, timestep in enumerate(timesteps) if low <= timestep <= high]
            if chosen:
                yield SelectedSample(row, chosen)
