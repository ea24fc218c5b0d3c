"""Select the records to train on and to validate with, so that an ablation needs no new data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.base.loading import first_line
from stages.base.size import size_name
from stages.errors import DamageError, UserError
from stages.records.dataset import Dataset
from stages.train.config import TrainConfig

Row = dict[str, Any]  # a row of the manifest
LEAVE_OUT = ("scale_range", "timestep_range", "filters")  # options that may leave no record
FEW_HELD_OUT = 4  # trajectories, where a share gives one or none


@dataclass(frozen=True)
class SelectedSample:
    """A sample to read, or some of its records.

    Attributes:
        row: its row of the manifest.
        chosen: the indices of the records to use; None for all.
    """

    row: Row
    chosen: Sequence[int] | None = None

    @property
    def records(self) -> int:
        return self.row["records"] if self.chosen is None else len(self.chosen)

    @property
    def name(self) -> str:
        return f"{self.row['shard']} {self.row['key']}"

    @cached_property
    def size(self) -> str:
        """The name of its records' size."""
        return size_name(self.row)


def select(dataset: Dataset, config: TrainConfig) -> tuple[list[SelectedSample], list[SelectedSample]]:
    """(training, validation): the samples to read, and of each the records in `timestep_range`.

    The held-out trajectories depend on the seed and the whole manifest only, so that runs on parts of a dataset
    validate with the same ones.

    Raises:
        UserError: a filter is invalid, no record is left, or none has guidance.
    """
    manifest = dataset.manifest.filter(pc.field("denoiser") == choose_denoiser(dataset, config))
    held_out = hold_out(manifest, config.validation_share, config.seed)
    training, validation = (matching(table, config) for table in held_out)
    if config.max_trajectories is not None:
        first = np.unique(training["trajectory"].to_numpy())[: config.max_trajectories]
        training = training.filter(pc.field("trajectory").isin(first))
    check_scales(dataset, manifest, config)
    parts = tuple(list(in_timestep_range(dataset, table, config)) for table in (training, validation))
    if not all(parts) and pc.count_distinct(dataset.manifest["trajectory"]).as_py() < 2:
        raise UserError(
            f"{dataset.root}: holds a single trajectory, and validation needs one: generate more of them "
            "(num_trajectories)"
        )
    for samples, purpose in zip(parts, ("train on", "validate with"), strict=True):
        if not samples:
            raise UserError(f"{dataset.root}: no record is left to {purpose}: {_way_out(config, parts, held_out[1])}")
        if all(sample.row["scale"] == 1 for sample in samples):
            raise UserError(
                f"{dataset.root}: every record to {purpose} has scale 1, which is no guidance: generate with a wider "
                "guidance_scale, or change validation_share, seed, scale_range or filters"
            )
    return parts[0], parts[1]


def _way_out(config: TrainConfig, parts: tuple[list[SelectedSample], ...], held_out: pa.Table) -> str:
    """What to change where a part has no samples: the options that leave out records."""
    given = [name for name in LEAVE_OUT if getattr(config, name) is not None]
    share = f"validation_share={config.validation_share:g}"
    if not given:
        return f"change {share}"
    if not parts[0]:
        return f"widen {' or '.join(given)}"
    count = pc.count_distinct(held_out["trajectory"]).as_py()
    return f"none of the {count} held-out trajectories has one: raise {share}, or widen {' or '.join(given)}"


def describe_selection(
    dataset: Dataset, training: list[SelectedSample], held_out: list[SelectedSample]
) -> dict[str, Any]:
    """What was selected, for an adapter's metadata: counts, and the latents' shape at each size."""
    sizes = sorted({sample.size for sample in training})
    return {
        "trained": _counts(training),
        "held_out": _counts(held_out),
        "sizes": {size: dataset.info.sizes[size].tensors["latent"].shape for size in sizes},
    }


def _counts(samples: list[SelectedSample]) -> dict[str, int]:
    trajectories = {sample.row["trajectory"] for sample in samples}
    return {"trajectories": len(trajectories), "records": sum(sample.records for sample in samples)}


def check_scales(dataset: Dataset, manifest: pa.Table, config: TrainConfig) -> None:
    """
    Raises:
        UserError: no record has a scale in `scale_range`.
    """
    if config.scale_range is None:
        return
    (low, high), found = interval("scale_range", config.scale_range), pc.min_max(manifest["scale"]).as_py()
    if not pc.any(pc.and_(pc.greater_equal(manifest["scale"], low), pc.less_equal(manifest["scale"], high))).as_py():
        raise UserError(
            f"scale_range={config.scale_range}: no record of {dataset.root} has such a scale: they are "
            f"{found['min']:.3g} to {found['max']:.3g}"
        )


def remarks(dataset: Dataset, held_out: list[SelectedSample], config: TrainConfig) -> list[str]:
    """What a user should know about the selection, a line each."""
    lines = []
    trajectories = len({sample.row["trajectory"] for sample in held_out})
    asked = round(config.validation_share * pc.count_distinct(dataset.manifest["trajectory"]).as_py())
    if trajectories == 1:
        lines.append("validation: a single trajectory, whose loss says little: raise validation_share")
    elif trajectories > asked:
        lines.append(
            f"validation: {trajectories} trajectories are held out; validation_share={config.validation_share:g} gives "
            f"{asked}, which is too few to judge by"
        )
    low, high = dataset.plan.guidance.scale_range
    if config.scale_range and not low <= config.scale_range[0] <= config.scale_range[1] <= high:
        lines.append(
            f"scale_range={config.scale_range}: the dataset has scales {low:g} to {high:g}, and trains no others"
        )
    return lines


def choose_denoiser(dataset: Dataset, config: TrainConfig) -> str:
    """The denoiser to adapt, by its name in the pipeline.

    Raises:
        UserError: the teacher has several and none is named, or none of that name.
    """
    names = sorted(dataset.manifest["denoiser"].unique().to_pylist())
    if config.denoiser is None and len(names) == 1:
        return names[0]
    if config.denoiser is None or config.denoiser not in names:
        message = "several denoisers, and each needs its own adapter" if config.denoiser is None else "no such denoiser"
        raise UserError(
            f"denoiser={config.denoiser}: the teacher has {message}: say denoiser={' or denoiser='.join(names)}"
        )
    return config.denoiser


def hold_out(manifest: pa.Table, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """(training, validation): whole trajectories are held out, because the records of a trajectory are correlated."""
    trajectories = np.unique(manifest["trajectory"].to_numpy())
    count = round(share * len(trajectories))
    if count < 2:  # one trajectory says little
        count = max(1, min(FEW_HELD_OUT, len(trajectories) // 2))
    chosen = np.random.default_rng([seed, 1]).permutation(trajectories)[:count]
    held = np.isin(manifest["trajectory"].to_numpy(), chosen)
    return manifest.filter(pa.array(~held)), manifest.filter(pa.array(held))


def matching(table: pa.Table, config: TrainConfig) -> pa.Table:
    """The rows with a scale in `scale_range` that pass `filters`, a conjunction as in Parquet readers."""
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
            f"filters={config.filters}: {first_line(error)}: give each as [column, operator, value] with a column of "
            f"the manifest: {', '.join(table.column_names)}"
        ) from error


def trained_scales(samples: list[SelectedSample], config: TrainConfig) -> list[float] | None:
    """The lowest and highest scale that a run was restricted to; None if it trains on all scales of the dataset."""
    if config.filters:
        scales = [sample.row["scale"] for sample in samples]
        return [min(scales), max(scales)]
    return config.scale_range


def interval(name: str, value: list[float]) -> tuple[float, float]:
    if len(value) != 2 or not value[0] <= value[1]:
        raise UserError(f"{name}={value}: give [LOW,HIGH], the lower number first")
    return value[0], value[1]


def in_timestep_range(dataset: Dataset, table: pa.Table, config: TrainConfig) -> Iterator[SelectedSample]:
    """The samples with records at timesteps in `timestep_range`, both ends included, as the denoiser receives them."""
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
                yield SelectedSample(row)  # reading its records will report the damage
                continue
            chosen = [i for i, timestep in enumerate(timesteps) if low <= timestep <= high]
            if chosen:
                yield SelectedSample(row, chosen)
