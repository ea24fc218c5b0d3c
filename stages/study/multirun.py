"""Sweeps: train every combination of the values that a key is given, and compare the runs in one table.

Each run is a `pipeline.train` process of its own, so training needs to know neither the other runs nor Ray.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stages.configuration.parsing import files_and_overrides, parse
from stages.errors import UsageError, UserError
from stages.storage.files import check_folder, write_json
from stages.study.subprocess_run import run_command

CANCEL_TIMEOUT = 30.0  # seconds
MAX_NAME_LENGTH = 200  # bytes; log files and temporary files append to the name
UNSAFE_CHARACTERS = re.compile(r"[^\w.,+-]+")
COLUMNS = {
    "adapter_parameters": ("parameters", "{:,}"),
    "adapter_share": ("share", "{:.2%}"),
    "validation_loss": ("validation loss", "{:.5f}"),
    "gap_left": ("gap left", "{:.3f}"),
    "records_per_second": ("records/s", "{:,.0f}"),
}


class TrainingRun(NamedTuple):
    """One combination: its values of the compared keys, its folder, and the overrides of its command."""

    compared: dict[str, str]
    folder: Path
    overrides: list[str]


class Outcome(NamedTuple):
    """Whether a run succeeded, and the last line of its output."""

    run: TrainingRun
    succeeded: bool
    last_line: str


def multirun(overrides: list[str]) -> None:
    """Train every combination; print a line as each run ends, then a table, which OUTPUT/multirun.json holds too.

    The same overrides again skip the finished runs and resume the others.

    Raises:
        UsageError: no key has several values, or a combination is invalid; no run was started.
        UserError: a run failed; the others were trained nevertheless.
    """
    root, runs = combinations(overrides)
    check_folder(root)
    print(f"{root}: {len(runs)} runs; their output goes to {root}/NAME.log", flush=True)
    rows: dict[Path, dict[str, Any]] = {}
    # Ray's workers import this file, and must not import torch with it.
    from stages.base.loading import (
        has_several_gpus,
    )

    with closing(train_over_ray(runs) if has_several_gpus() else one_by_one(runs)) as outcomes:
        for run, succeeded, line in outcomes:
            rows[run.folder] = result_row(run) if succeeded else setting_row(run) | {"error": line}
            failure = "" if succeeded else "failed: "
            print(f"[{len(rows)}/{len(runs)}] {run.folder.name}: {failure}{line}", flush=True)
    ordered = [rows[run.folder] for run in runs]
    write_json(root / "multirun.json", {"rows": ordered})
    print(table(ordered))
    if failed := sum("error" in row for row in ordered):
        raise UserError(f"{root}: {failed} of {len(runs)} runs failed; repeat the command to resume them")


def combinations(overrides: list[str]) -> tuple[Path, list[TrainingRun]]:
    """The folder of all runs, and the runs, named by their values; the last key varies fastest."""
    files, overrides = files_and_overrides(overrides)
    choices = {override.partition("=")[0]: alternatives(override) for override in overrides}
    compared = [key for key, choice in choices.items() if len(choice) > 1]
    if not compared:
        raise UsageError("--multirun: no key has several values: give one several, such as seed=0,1")
    if "output_dir" in compared:
        raise UsageError("output_dir: all runs share one folder: name one, in quotes if it contains a comma")
    shared = [*(override for file in files for override in ("--config", file)), "resume_from_checkpoint=latest"]
    each = [[*shared, *chosen] for chosen in itertools.product(*choices.values())]
    root, *_ = [output_dir(overrides) for overrides in each]
    runs = [new_run(root, overrides, compared) for overrides in each]
    longest = max((run.folder.name for run in runs), key=len)
    if len(os.fsencode(longest)) > MAX_NAME_LENGTH:
        raise UsageError(f"{longest}: too long for a folder name: compare fewer keys at once, or give shorter values")
    name, times = Counter(run.folder.name for run in runs).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{name}: {times} runs would get this name: give each value once")
    return root, runs


def alternatives(override: str) -> list[str]:
    """Split `key=a,b` into `key=a` and `key=b` as YAML splits a list: not within brackets, braces or quotes."""
    key, _, value = override.partition("=")
    flow = f"[{value}]"
    try:
        whole = yaml.compose(flow, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        whole = None
    if not isinstance(whole, yaml.SequenceNode):
        return [override]  # not a list of values: `parse` reads it as one value
    parts = [flow[node.start_mark.index : node.end_mark.index] for node in whole.value]
    texts = [node.value if getattr(node, "style", None) in ("'", '"') else None for node in whole.value]
    if parts == [value] and texts == [None]:
        return [override]
    return [f"{key}={part if text is None else text}" for part, text in zip(parts, texts, strict=True)] or [override]


def output_dir(overrides: list[str]) -> Path:
    """The output folder of a run, once its overrides are checked."""
    # Ray's workers import this file, and must not import torch with it.
    from stages.train.config import TrainConfig
    from stages.train.trainer import check

    config = parse(TrainConfig, overrides)
    check(config)
    return Path(config.output_dir)


def new_run(root: Path, overrides: list[str], compared: list[str]) -> TrainingRun:
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    values = {key: given[key] for key in compared}
    folder = root / ",".join(f"{key}={UNSAFE_CHARACTERS.sub('_', values[key]).strip('_')}" for key in compared)
    return TrainingRun(values, folder, [*overrides, f"output_dir={folder}"])


def train(run: TrainingRun, working_dir: Path) -> Outcome:
    """Train in a process of its own, which runs in `working_dir`."""
    result = run_command("train", run.overrides, working_dir / f"{run.folder}.log", working_dir)
    return Outcome(run, result.succeeded, result.last_line.removeprefix(f"{run.folder}: "))


def one_by_one(runs: list[TrainingRun]) -> Generator[Outcome]:
    for run in runs:
        yield train(run, Path.cwd())


def train_over_ray(runs: list[TrainingRun], **resources: float) -> Generator[Outcome]:
    """Train the runs through Ray and yield each outcome as its run ends.

    Args:
        resources: what each run takes, by Ray's names; by default one GPU.
    """
    import ray

    from stages.cluster import joined

    with joined():
        print(f"training on the {ray.cluster_resources().get('GPU', 0):g} GPUs of the Ray cluster", flush=True)
        task = ray.remote(max_retries=0, **(resources or {"num_gpus": 1}))(train)
        waiting = {task.remote(run, Path.cwd()): run for run in runs}
        try:
            while waiting:
                (reference,), _ = ray.wait(list(waiting))
                run = waiting.pop(reference)
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None) or error
                    outcome = Outcome(run, False, str(cause).strip().partition("\n")[0])
                yield outcome
        finally:
            for reference in waiting:
                ray.cancel(reference)
            if waiting:
                ray.wait(list(waiting), num_returns=len(waiting), timeout=CANCEL_TIMEOUT)


def setting_row(run: TrainingRun) -> dict[str, Any]:
    return {"name": run.folder.name, "overrides": run.compared}


def result_row(run: TrainingRun) -> dict[str, Any]:
    """The row of a finished run; `gap_left` is its validation loss as a share of the unguided base's."""
    training = json.loads((run.folder / "training.json").read_bytes())
    loss, unguided = training["validation_loss"], training["validation_loss_unguided"]
    measures = {key: training[key] for key in COLUMNS if key in training} | {"validation_loss_unguided": unguided}
    return setting_row(run) | measures | ({"gap_left": loss / unguided} if unguided else {})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as an aligned text table; a failed run's error ends its row."""
    cells = [[*rows[0]["overrides"], *(title for title, _ in COLUMNS.values())]]
    for row in rows:
        measures = (form.format(row[key]) if key in row else "-" for key, (_, form) in COLUMNS.items())
        cells.append([*row["overrides"].values(), *measures])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.rjust, line, widths)) for line in cells)
    errors = ["", *(row.get("error", "") for row in rows)]
    return "\n".join(f"{line}  {error}".rstrip() for line, error in zip(lines, errors, strict=True))
