"""An adapter trained on two sizes against one trained on one, at both of these sizes and at two others.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.several_sizes FOLDER

Each adapter has as many trajectories of the emoji teacher, and as many steps. The command makes what the folder lacks,
and prints the gap closed at each size as JSON.
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
    scale: float = 3.0


def rows(folder: Path, budget: Budget, sizes: list[list[int]]) -> list[dict[str, Any]]:
    """The gap that each adapter closes at each size."""
    found = []
    for name, trained in TRAINED.items():
        data, run = folder / name, folder / f"run_{name}"
        command("generate", "--config", "configs/generate/emoji.yaml", f"output_dir={data}", "num_workers=1",
                f"num_trajectories={budget.trajectories}", f"teacher.sizes={trained}")  # fmt: skip
        command("train", f"data_dir={data}", f"output_dir={run}", "adapter.rank=5", f"max_train_steps={budget.steps}",
                "resume_from_checkpoint=latest")  # fmt: skip
        for size in sizes:
            output = folder / f"{name}_{size[0]}x{size[1]}"
            command("evaluate", f"adapter_dir={run}", f"output_dir={output}", "reference=null", f"size={size}",
                    "prompts=stages/embedded/emoji/names.csv", "methods=[one_pass]", f"guidance_scale=[{budget.scale}]",
                    f"num_samples={budget.samples}", "num_inference_steps=20")  # fmt: skip
            (row,) = (row for row in evaluated(output) if row["method"] == "one_pass")
            found.append({"trained": trained, "size": size, "gap_closed": row["gap_closed"]})
    return found


def command(name: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", f"pipeline.{name}", *words], check=True, stdout=sys.stderr)


def evaluated(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "evaluation.json").read_text())["rows"]


def main(folder: str) -> None:
    budget = Budget()
    print(json.dumps({"budget": budget._asdict(), "rows": rows(Path(folder), budget, SIZES)}, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
