"""Verify a dataset: count what it holds, and find what is missing or damaged. Exit status 1 if anything is.

python -m pipeline.verify data_dir=data/mnist_dit
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pipeline.command import run
from stages.configuration.options import check_bounds, option
from stages.errors import StorageError, UserError
from stages.records.dataset import how_to_finish
from stages.records.plans import DATASET_FILE, MANIFEST_FILE
from stages.records.repair import repair
from stages.records.verification import survey
from stages.storage.files import check_file, to_json, whole_file
from stages.storage.folder import Folder, open_folder

NAMED_ORPHANS = 5
REPORT = "verification.json"
GENERATED = (DATASET_FILE, MANIFEST_FILE)  # generation writes these again when it makes missing units


@dataclass
class VerifyConfig:
    data_dir: str = option(MISSING, "folder of the dataset, on disk, in a bucket or on the hub")
    output: str | None = option(None, "file of the report; by default `verification.json` in the dataset")
    deep: bool = option(
        True, "read every shard; otherwise only `dataset.json`, manifests, commit records and the sizes of shards"
    )
    repair: bool = option(
        False,
        "move damage to `quarantine/` in the dataset, so that generating again makes it anew; write manifests again from "
        "whole commits; remove orphans older than `grace`",
    )
    grace: float = option(86400.0, "age in seconds from which a repair removes an orphan", at_least=0)


def bars(counts: dict[str, int]) -> str:
    """Draw a histogram in text."""
    widest, most = max(map(len, counts)), max(counts.values())
    return "\n".join(
        f"  {name:>{widest}}  {count:>9,}  {'#' * round(40 * count / most)}" for name, count in counts.items()
    )


def format_histogram(name: str, histogram: Any) -> str:
    if isinstance(histogram, list):
        histogram = {f"{bin['from']:.4g} to {bin['to']:.4g}": bin["count"] for bin in histogram}
    return f"{name}:\n{bars(histogram)}" if histogram else f"{name}: none"


def survey_and_repair(root: Folder, config: VerifyConfig) -> dict[str, Any]:
    """Return the content of the report; after a repair, it describes the repaired dataset."""
    found = survey(root, config.deep)
    repaired = repair(found, config.grace) if config.repair else []
    if repaired:
        timesteps, found = found.timesteps, survey(root, deep=False)
        found.deep, found.timesteps = config.deep, {u: t for u, t in timesteps.items() if u in found.commits}
    return found.summary() | {"repaired": repaired}


def main(config: VerifyConfig) -> None:
    check_bounds(config)
    root = open_folder(config.data_dir)
    check_writable(root, config)
    found = survey_and_repair(root, config)
    print_report(root, found)
    report(root, config.output, found)
    problems = found["problems"]
    unfinished = [problem for problem in problems if problem["shard"] == DATASET_FILE]
    if unfinished and (config.repair or all(problem["shard"] in GENERATED for problem in problems)):
        expected, there = unfinished[0]["expected"], unfinished[0]["found"]
        raise UserError(f"{root}: unfinished: expected {expected}, found {there}: {how_to_finish(root)}")
    if problems:
        raise UserError(
            f"{root}: {len(problems)} problem(s); the first: {problems[0]['shard']}: found {problems[0]['found']}: "
            f"`python -m pipeline.verify {root.override('data_dir')} repair=true` mends it, or sets aside what must be made "
            "again"
        )
    print("whole: nothing is missing or damaged" + ("" if config.deep else "; no shard was read"))


def check_writable(root: Folder, config: VerifyConfig) -> None:
    """Find out before any shard is read that the repair or the report cannot be written.

    Raises:
        StorageError: it cannot.
    """
    if config.repair and root.exists(DATASET_FILE):
        root.probe("leave repair=true out, or allow writes")
    if config.output is None:
        return
    try:
        if "://" in config.output:
            place_of(config.output)[0].probe("name a file elsewhere")
        else:
            check_file(Path(config.output))
    except StorageError as error:
        raise StorageError(f"output={config.output}: {error}") from error


def place_of(output: str) -> tuple[Folder, str]:
    """Split the address of a file in a bucket into its folder and its name there."""
    folder, _, name = output.rpartition("/")
    return open_folder(folder), name


def report(root: Folder, output: str | None, found: dict[str, Any]) -> None:
    """Write the report; if the dataset is read-only, warn instead."""
    content = to_json(found)
    if output is None:
        try:
            root.write(REPORT, content)
        except StorageError as error:
            message = str(error).partition("; ")[0]
            warnings.warn(f"{message}: say output=FILE to have the report elsewhere", stacklevel=1)
    elif "://" in output:
        folder, name = place_of(output)
        folder.write(name, content)
    else:
        with whole_file(Path(output)) as file:
            file.write(content)


def print_report(root: Folder, found: dict[str, Any]) -> None:
    for name, histogram in found["histograms"].items():
        print(format_histogram(name, histogram))
    print(
        f"{root}: {found['trajectories']:,} trajectories, {found['records']:,} records, {found['shards']:,} shards, "
        f"{found['bytes']:,} bytes"
    )
    if (orphans := found["orphans"])["count"]:
        names = ", ".join(orphans["names"][:NAMED_ORPHANS]) + (", ..." if orphans["count"] > NAMED_ORPHANS else "")
        print(f"orphans of attempts that were ended: {orphans['count']:,}, {orphans['bytes']:,} bytes: {names}")
    if (growth := found["growth"])["units_planned"]:
        made = f"{growth['units_committed']:,} of {growth['units_planned']:,} further units are made"
        print(f"growing: {made}; the command that began the growth makes the rest")
    for done in found["repaired"]:
        print(f"  {done['shard']}: expected {done['expected']}, found {done['found']}: {done['done']}")
    for problem in found["problems"]:
        print(f"  {problem['shard']}: expected {problem['expected']}, found {problem['found']}")


if __name__ == "__main__":
    run(VerifyConfig, main, __doc__)
