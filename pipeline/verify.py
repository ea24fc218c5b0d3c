"""A dataset: what is in it, and is it whole. Exit status 1 if anything is missing or damaged.

python -m pipeline.verify data_dir=data/mnist_dit
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pipeline.command import run
from stages.errors import UserError
from stages.records.folder import open_folder
from stages.records.storage import to_json, write_json
from stages.records.verification import verify


@dataclass
class VerifyConfig:
    data_dir: str = field(default=MISSING, metadata={"help": "folder of the dataset, on disk or in a bucket"})
    output: str | None = field(default=None, metadata={"help": "by default `verification.json` in the dataset"})


def bars(counts: dict[str, int]) -> str:
    """A histogram in text."""
    widest, most = max(map(len, counts)), max(counts.values())
    return "\n".join(
        f"  {name:>{widest}}  {count:>9,}  {'#' * round(40 * count / most)}" for name, count in counts.items()
    )


def told(name: str, histogram: Any) -> str:
    if isinstance(histogram, list):
        histogram = {f"{bin['from']:.4g} to {bin['to']:.4g}": bin["count"] for bin in histogram}
    return f"{name}:\n{bars(histogram)}" if histogram else f"{name}: none"


def main(config: VerifyConfig) -> None:
    root = open_folder(config.data_dir)
    found = verify(config.data_dir)
    if config.output is None:
        root.write("verification.json", to_json(found))
    else:
        write_json(Path(config.output), found)
    for name, histogram in found["histograms"].items():
        print(told(name, histogram))
    print(
        f"{root}: {found['trajectories']:,} trajectories, {found['records']:,} records, {found['shards']:,} shards, "
        f"{found['bytes']:,} bytes"
    )
    for problem in found["problems"]:
        print(f"  {problem['shard']}: expected {problem['expected']}, found {problem['found']}")
    if problems := found["problems"]:
        raise UserError(
            f"{root}: {len(problems)} problem(s); the first: {problems[0]['shard']}: found {problems[0]['found']}"
        )
    print("whole: nothing is missing or damaged")


if __name__ == "__main__":
    run(VerifyConfig, main, __doc__)
