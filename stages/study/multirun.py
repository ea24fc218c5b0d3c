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

from stages.configuration.parsing import files_and_words, parse
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


class Run(NamedTuple):
    """One combination: its value of each key that is compared, its folder, and the words that its process is given."""

    overrides: dict[str, str]
    folder: Path
    words: list[str]


class Outcome(NamedTuple):
    """How a run ended: whether well, and the last line that it said."""

    run: Run
    done: bool
    line: str


def multirun(words: list[str]) -> None:
    """Train every combination, tell a line as each ends, and then the table that OUTPUT/multirun.json holds too.

    The same words again go on where the runs were: finished ones have nothing to do, unfinished ones resume.

    Raises:
        UsageError: nothing is compared, or a combination is not understood or out of bounds; then none is begun.
        UserError: a run failed, which stops no other.
    """
    root, runs = combinations(words)
    check_folder(root)
    print(f"{root}: {len(runs)} runs; what each says is in {root}/NAME.log", flush=True)
    rows: dict[Path, dict[str, Any]] = {}
    from stages.base.loading import has_several_gpus  # torch with it: not for Ray's workers, which import this file

    with closing(over_ray(runs) if has_several_gpus() else one_by_one(runs)) as outcomes:
        for run, done, line in outcomes:
            rows[run.folder] = measured(run) if done else described(run) | {"error": line}
            print(f"[{len(rows)}/{len(runs)}] {run.folder.name}: {'' if done else 'failed: '}{line}", flush=True)
    ordered = [rows[run.folder] for run in runs]
    write_json(root / "multirun.json", {"rows": ordered})
    print(table(ordered))
    if failed := sum("error" in row for row in ordered):
        raise UserError(f"{root}: {failed} of {len(runs)} runs failed; the same command again goes on with them")


def combinations(words: list[str]) -> tuple[Path, list[Run]]:
    """The folder of all runs, and the runs, which are named by their values; the last key varies fastest."""
    files, words = files_and_words(words)
    choices = {word.partition("=")[0]: alternatives(word) for word in words}
    compared = [key for key, choice in choices.items() if len(choice) > 1]
    if not compared:
        raise UsageError("--multirun: nothing is compared: give a key several values, such as seed=0,1")
    if "output_dir" in compared:
        raise UsageError("output_dir: one folder holds all the runs: name one, in quotes if it has a comma")
    shared = [*(word for file in files for word in ("--config", file)), "resume_from_checkpoint=latest"]
    each = [[*shared, *chosen] for chosen in itertools.product(*choices.values())]
    root, *_ = [output_dir(words) for words in each]
    runs = [new_run(root, words, compared) for words in each]
    longest = max((run.folder.name for run in runs), key=len)
    if len(os.fsencode(longest)) > LONGEST_NAME:
        raise UsageError(f"{longest}: too long for the name of a folder: compare fewer keys at once, or shorter values")
    name, times = Counter(run.folder.name for run in runs).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{name}: {times} runs would have this name: give each value once")
    return root, runs


def alternatives(word: str) -> list[str]:
    """`key=a,b` as `key=a` and `key=b`, parted as YAML parts a list: not within brackets, braces or quotes."""
    key, _, value = word.partition("=")
    flow = f"[{value}]"
    try:
        whole = yaml.compose(flow, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        whole = None
    if not isinstance(whole, yaml.SequenceNode):
        return [word]  # no list of values: `parse` judges it as one
    parts = [flow[node.start_mark.index : node.end_mark.index] for node in whole.value]
    texts = [node.value if getattr(node, "style", None) in ("'", '"') else None for node in whole.value]
    if parts == [value] and texts == [None]:
        return [word]
    return [f"{key}={part if text is None else text}" for part, text in zip(parts, texts, strict=True)] or [word]


def output_dir(words: list[str]) -> Path:
    """The output folder that a run's words name, once nothing in them is refused."""
    from stages.train.config import TrainConfig  # torch with it: not for Ray's workers, which import this file
    from stages.train.trainer import check

    config = parse(TrainConfig, words)
    check(config)
    return Path(config.output_dir)


def new_run(root: Path, words: list[str], compared: list[str]) -> Run:
    values = dict(word.split("=", 1) for word in words if "=" in word)
    overrides = {key: values[key] for key in compared}
    folder = root / ",".join(f"{key}={UNSAFE_IN_A_NAME.sub('_', overrides[key]).strip('_')}" for key in compared)
    return Run(overrides, folder, [*words, f"output_dir={folder}"])


def train(run: Run, here: Path) -> Outcome:
    """Train in a process of its own, which works in the folder `here`."""
    ended = run_child("train", run.words, here / f"{run.folder}.log", here)
    return Outcome(run, ended.done, ended.line.removeprefix(f"{run.folder}: "))


def one_by_one(runs: list[Run]) -> Generator[Outcome]:
    for run in runs:
        yield train(run, Path.cwd())


def over_ray(runs: list[Run], **resources: float) -> Generator[Outcome]:
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


def described(run: Run) -> dict[str, Any]:
    return {"name": run.folder.name, "overrides": run.overrides}


def measured(run: Run) -> dict[str, Any]:
    """The row of a run that is done; `gap_left` is the share of the base's own loss without guidance that is left."""
    training = json.loads((run.folder / "training.json").read_bytes())
    loss, unguided = training["validation_loss"], training["validation_loss_unguided"]
    measures = {key: training[key] for key in COLUMNS if key in training} | {"validation_loss_unguided": unguided}
    return described(run) | measures | ({"gap_left": loss / unguided} if unguided else {})


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
