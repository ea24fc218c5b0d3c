"""Variants side by side: each combination of the values between commas is trained, and one table compares them.

Each run is a process of `pipeline.train`, so that training itself knows neither its siblings nor Ray.
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
from stages.study.subprocess_run import run_child

SECONDS_TO_END = 30.0
LONGEST_NAME = 200  # bytes; a log's name and what is written aside add to it
UNSAFE_IN_A_NAME = re.compile(r"[^\w.,+-]+")
COLUMNS = {
    "adapter_parameters": ("parameters", "{:,}"),
    "adapter_share": ("share", "{:.2%}"),
    "validation_loss": ("validation loss", "{:.5f}"),
    "gap_left": ("gap left", "{:.3f}"),
    "records_per_second": ("records/s", "{:,.0f}"),
}


class TrainingRun(NamedTuple):
    """One combination: its value of each key that is compared, its folder, and the words that its process is given."""

    compared: dict[str, str]
    folder: Path
    overrides: list[str]


class Outcome(NamedTuple):
    """How a run ended: whether well, and the last line that it said."""

    run: TrainingRun
    done: bool
    line: str


def multirun(overrides: list[str]) -> None:
    """Train every combination, tell a line as each ends, and then the table that OUTPUT/multirun.json holds too.

    The same words again go on where the runs were: finished ones have nothing to do, unfinished ones resume.

    Raises:
        UsageError: nothing is compared, or a combination is not understood or out of bounds; then none is begun.
        UserError: a run failed, which stops no other.
    """
    root, runs = combinations(overrides)
    check_folder(root)
    print(f"{root}: {len(runs)} runs; what each says is in {root}/NAME.log", flush=True)
    rows: dict[Path, dict[str, Any]] = {}
    from stages.base.loading import has_several_gpus  # torch with it: not for Ray's workers, which import this file

    with closing(train_over_ray(runs) if has_several_gpus() else one_by_one(runs)) as outcomes:
        for run, done, line in outcomes:
            rows[run.folder] = measured(run) if done else settings_of(run) | {"error": line}
            print(f"[{len(rows)}/{len(runs)}] {run.folder.name}: {'' if done else 'failed: '}{line}", flush=True)
    ordered = [rows[run.folder] for run in runs]
    write_json(root / "multirun.json", {"rows": ordered})
    print(table(ordered))
    if failed := sum("error" in row for row in ordered):
        raise UserError(f"{root}: {failed} of {len(runs)} runs failed; the same command again goes on with them")


def combinations(overrides: list[str]) -> tuple[Path, list[TrainingRun]]:
    """The folder of all runs, and the runs, which are named by their values; the last key varies fastest."""
    files, overrides = files_and_overrides(overrides)
    choices = {override.partition("=")[0]: alternatives(override) for override in overrides}
    compared = [key for key, choice in choices.items() if len(choice) > 1]
    if not compared:
        raise UsageError("--multirun: nothing is compared: give a key several values, such as seed=0,1")
    if "output_dir" in compared:
        raise UsageError("output_dir: one folder holds all the runs: name one, in quotes if it has a comma")
    shared = [*(override for file in files for override in ("--config", file)), "resume_from_checkpoint=latest"]
    each = [[*shared, *chosen] for chosen in itertools.product(*choices.values())]
    root, *_ = [output_dir(overrides) for overrides in each]
    runs = [new_run(root, overrides, compared) for overrides in each]
    longest = max((run.folder.name for run in runs), key=len)
    if len(os.fsencode(longest)) > LONGEST_NAME:
        raise UsageError(f"{longest}: too long for the name of a folder: compare fewer keys at once, or shorter values")
    name, times = Counter(run.folder.name for run in runs).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{name}: {times} runs would have this name: give each value once")
    return root, runs


def alternatives(override: str) -> list[str]:
    """`key=a,b` as `key=a` and `key=b`, parted as YAML parts a list: not within brackets, braces or quotes."""
    key, _, value = override.partition("=")
    flow = f"[{value}]"
    try:
        whole = yaml.compose(flow, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        whole = None
    if not isinstance(whole, yaml.SequenceNode):
        return [override]  # no list of values: `parse` judges it as one
    parts = [flow[node.start_mark.index : node.end_mark.index] for node in whole.value]
    texts = [node.value if getattr(node, "style", None) in ("'", '"') else None for node in whole.value]
    if parts == [value] and texts == [None]:
        return [override]
    return [f"{key}={part if text is None else text}" for part, text in zip(parts, texts, strict=True)] or [override]


def output_dir(overrides: list[str]) -> Path:
    """The output folder that a run's words name, once nothing in them is refused."""
    from stages.train.config import TrainConfig  # torch with it: not for Ray's workers, which import this file
    from stages.train.trainer import check

    config = parse(TrainConfig, overrides)
    check(config)
    return Path(config.output_dir)


def new_run(root: Path, overrides: list[str], compared: list[str]) -> TrainingRun:
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    values = {key: given[key] for key in compared}
    folder = root / ",".join(f"{key}={UNSAFE_IN_A_NAME.sub('_', values[key]).strip('_')}" for key in compared)
    return TrainingRun(values, folder, [*overrides, f"output_dir={folder}"])


def train(run: TrainingRun, here: Path) -> Outcome:
    """Train in a process of its own, which works in the folder `here`."""
    ended = run_child("train", run.overrides, here / f"{run.folder}.log", here)
    return Outcome(run, ended.done, ended.line.removeprefix(f"{run.folder}: "))


def one_by_one(runs: list[TrainingRun]) -> Generator[Outcome]:
    for run in runs:
        yield train(run, Path.cwd())


def train_over_ray(runs: list[TrainingRun], **resources: float) -> Generator[Outcome]:
    """The runs as they end, over what Ray has; each takes one GPU, or the `resources` that are named as Ray names them."""
    import ray

    from stages.cluster import joined

    with joined():
        print(f"over the {ray.cluster_resources().get('GPU', 0):g} GPUs that Ray has", flush=True)
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
                ray.wait(list(waiting), num_returns=len(waiting), timeout=SECONDS_TO_END)


def settings_of(run: TrainingRun) -> dict[str, Any]:
    return {"name": run.folder.name, "overrides": run.compared}


def measured(run: TrainingRun) -> dict[str, Any]:
    """The row of a run that is done; `gap_left` is the share of the base's own loss without guidance that is left."""
    training = json.loads((run.folder / "training.json").read_bytes())
    loss, unguided = training["validation_loss"], training["validation_loss_unguided"]
    measures = {key: training[key] for key in COLUMNS if key in training} | {"validation_loss_unguided": unguided}
    return settings_of(run) | measures | ({"gap_left": loss / unguided} if unguided else {})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text with aligned columns, for a terminal; an error stands at the end of its row."""
    cells = [[*rows[0]["overrides"], *(title for title, _ in COLUMNS.values())]]
    for row in rows:
        measures = (form.format(row[key]) if key in row else "-" for key, (_, form) in COLUMNS.items())
        cells.append([*row["overrides"].values(), *measures])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.rjust, line, widths)) for line in cells)
    errors = ["", *(row.get("error", "") for row in rows)]
    return "\n".join(f"{line}  {error}".rstrip() for line, error in zip(lines, errors, strict=True))
