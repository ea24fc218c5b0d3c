"""Every variant on the same trajectories of the digits' teacher: size, gap closed, Frechet distance, time of one pass.

python -m tests.benchmarks.variants OUTPUT [variant ...]

Runs the commands of the pipeline as a user would, each variant with its own configuration, and writes OUTPUT/variants.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from stages.adapters import GuidanceAdapter

SCALE, STEPS, SAMPLES = 2, 2000, 1000
NARROW = ["adapter.hidden_size=32"]  # the teacher is 96 wide
SIZES = {"embedding": [*NARROW, "adapter.rank=64"]}
CONFIGS = Path(__file__).parents[2] / "configs"


def run(command: str, *options: str) -> None:
    subprocess.run([sys.executable, "-m", f"pipeline.{command}", *options], check=True)


def dataset(folder: Path, *options: str) -> Path:
    """A finished one comes back at once."""
    run("generate", "--config", str(CONFIGS / "generate" / "mnist_dit.yaml"), f"output_dir={folder}", *options)
    return folder


def measured(variant: str, folder: Path) -> dict[str, Any]:
    """Train and evaluate one variant; its row of the table."""
    fixed = variant == "lora_fixed"
    data = dataset(folder / "one_scale", f"guidance_scale=[{SCALE},{SCALE}]") if fixed else dataset(folder / "scales")
    output, config = folder / variant, CONFIGS / "train" / f"{variant}.yaml"
    options = [f"data_dir={data}", f"output_dir={output}", f"max_train_steps={STEPS}", "report_to=none"]
    run("train", "--config", str(config), *options, *SIZES.get(variant, NARROW))
    run("evaluate", f"adapter_dir={output}", f"guidance_scale=[{SCALE}]", f"num_samples={SAMPLES}")
    evaluation = json.loads((output / "evaluation" / "evaluation.json").read_text())
    told = {key: evaluation[key] for key in ("variant", "parameters", "share")}
    return told | {row["method"]: row for row in evaluation["rows"]}


def main(folder: str, *variants: str) -> None:
    output = Path(folder)
    rows = [measured(variant, output) for variant in variants or sorted(GuidanceAdapter.variants)]
    (output / "variants.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("| variant | parameters | share | gap closed | Frechet distance | time |")
    for row in sorted(rows, key=lambda row: row["one_pass"]["gap_closed"]):
        one = row["one_pass"]
        print(
            f"| `{row['variant']}` | {row['parameters']:,} | {row['share']:.1%} | {one['gap_closed']:.3f} | "
            f"{one['frechet_distance']:.1f} | {one['time_relative_to_none']:.2f}x |"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
