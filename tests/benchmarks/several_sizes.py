"""Adapters trained on two sizes against adapters trained on one, at both of these sizes and at two others.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.several_sizes FOLDER

All have as many trajectories of the emoji teacher, and as many steps. The command makes what the folder lacks, and
prints the gap that the adapter of each seed closes at each size, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

TRAINED = {"one": [[64, 64]], "two": [[64, 64], [48, 64]]}
SIZES = [[64, 64], [48, 64], [64, 48], [48, 48]]


class Budget(NamedTuple):
    """What the comparison costs."""

    trajectories: int = 600
    steps: int = 300
    samples: int = 100
    seeds: int = 3
    scale: float = 3.0


def rows(folder: Path, budget: Budget, sizes: list[list[int]]) -> list[dict[str, Any]]:
    """The gap that the adapters of each dataset close at each size: one for each seed of training."""
    found = []
    for name, trained in TRAINED.items():
        data = folder / name
        command("generate", "--config", "configs/generate/emoji.yaml", f"output_dir={data}", "num_workers=1",
                f"num_trajectories={budget.trajectories}", f"teacher.sizes={trained}")  # fmt: skip
        runs = [folder / f"run_{name}_{seed}" for seed in range(budget.seeds)]
        for seed, run in enumerate(runs):
            command("train", f"data_dir={data}", f"output_dir={run}", f"seed={seed}", "adapter.rank=5",
                    f"max_train_steps={budget.steps}", "resume_from_checkpoint=latest")  # fmt: skip
        found += [
            {"trained": trained, "size": size, "gap_closed": [gap_closed(run, size, budget) for run in runs]}
            for size in sizes
        ]
    return found


def gap_closed(run: Path, size: list[int], budget: Budget) -> float:
    """Evaluate an adapter at a size `[width, height]` in pixels."""
    output = run / f"at_{size[0]}x{size[1]}"
    command("evaluate", f"adapter_dir={run}", f"output_dir={output}", "reference=null", f"size={size}",
            "prompts=stages/embedded/emoji/names.csv", "methods=[one_pass]", f"guidance_scale=[{budget.scale}]",
            f"num_samples={budget.samples}", "num_inference_steps=20")  # fmt: skip
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    return next(row["gap_closed"] for row in rows if row["method"] == "one_pass")


def command(name: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", f"pipeline.{name}", *words], check=True, stdout=sys.stderr)


def main(folder: str) -> None:
    budget = Budget()
    print(json.dumps({"budget": budget._asdict(), "rows": rows(Path(folder), budget, SIZES)}, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
