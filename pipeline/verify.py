"""A dataset: what is in it, and is it whole. Exit status 1 if anything is missing or damaged.

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
from stages.records.dataset import finishing
from stages.records.plans import DATASET_FILE, MANIFEST_FILE
from stages.records.repair import repair
from stages.records.verification import survey
from stages.storage.files import check_file, to_json, whole_file
from stages.storage.folder import Folder, open_folder

NAMED_ORPHANS = 5
REPORT = "verification.json"
GENERATED = (DATASET_FILE, MANIFEST_FILE)  # what generation writes again where units are missing


@dataclass
class VerifyConfig:
    data_dir: str = option(MISSING, "folder of the dataset, on disk or in a bucket")
    output: str | None = option(None, "file of the report; by default `verification.json` in the dataset")
    deep: bool = option(
        True, "read every shard; else only description, manifests and commit records, and that each shard has its size"
    )
    repair: bool = option(
        False,
        "move what is damaged to `quarantine/` in the dataset, so that generating again makes it anew; write manifests again "
        "from whole commits; remove orphans older than `grace`",
    )
    grace: float = option(86400.0, "seconds that an orphan must be old to be removed", at_least=0)


def bars(counts: dict[str, int]) -> str:
    """A histogram in text."""
    widest, most = max(map(len, counts)), max(counts.values())
    return "\n".join(
        f"  {name:>{widest}}  {count:>9,}  {'#' * round(40 * count / most)}" for name, count in counts.items()
    )


def format_histogram(name: str, histogram: Any) -> str:
    if isinstance(histogram, list):
        histogram = {f"{bin['from']:.4g} to {bin['to']:.4g}": bin["count"] for bin in histogram}
    return f"{name}:\n{bars(histogram)}" if histogram else f"{name}: none"


def look(root: Folder, config: VerifyConfig) -> dict[str, Any]:
    """What the report tells; after a repair, of what is there then."""
    found = survey(root, config.deep)
    repaired = repair(found, config.grace) if config.repair else []
    if repaired:
        timesteps, found = found.timesteps, survey(root, deep=False)
        found.deep, found.timesteps = config.deep, {u: t for u, t in timesteps.items() if u in found.commits}
    return found.summary() | {"repaired": repaired}


def main(config: VerifyConfig) -> None:
    check_bounds(config)
    root = open_folder(config.data_dir)
    refuse_in_vain(root, config)
    found = look(root, config)
    print_report(root, found)
    report(root, config.output, found)
    problems = found["problems"]
    unfinished = [problem for problem in problems if problem["shard"] == DATASET_FILE]
    if unfinished and (config.repair or all(problem["shard"] in GENERATED for problem in problems)):
        expected, there = unfinished[0]["expected"], unfinished[0]["found"]
        raise UserError(f"{root}: unfinished: expected {expected}, found {there}: {finishing(root)}")
    if problems:
        raise UserError(
            f"{root}: {len(problems)} problem(s); the first: {problems[0]['shard']}: found {problems[0]['found']}: "
            f"`python -m pipeline.verify {root.override('data_dir')} repair=true` mends that, or sets aside what is to be made again"
        )
    print("whole: nothing is missing or damaged" + ("" if config.deep else "; no shard was read"))


def refuse_in_vain(root: Folder, config: VerifyConfig) -> None:
    """
    Raises:
        StorageError: what is to be written can be nowhere, which would come out after all shards were read.
    """
    if config.repair and root.exists(DATASET_FILE):
        root.probe("leave repair=true out, or let it be written to")
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
    """The folder of a file in a bucket, and its name there."""
    folder, _, name = output.rpartition("/")
    return open_folder(folder), name


def report(root: Folder, output: str | None, found: dict[str, Any]) -> None:
    """Write what was found; a dataset may be one that can only be read."""
    content = to_json(found)
    if output is None:
        try:
            root.write(REPORT, content)
        except StorageError as error:
            format_histogram = str(error).partition("; ")[0]
            warnings.warn(f"{format_histogram}: say output=FILE to have the report elsewhere", stacklevel=1)
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
        print(f"it grows: {made}; the command that began that makes the rest")
    for done in found["repaired"]:
        print(f"  {done['shard']}: expected {done['expected']}, found {done['found']}: {done['done']}")
    for problem in found["problems"]:
        print(f"  {problem['shard']}: expected {problem['expected']}, found {problem['found']}")


if __name__ == "__main__":
    run(VerifyConfig, main, __doc__)
