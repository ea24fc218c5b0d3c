"""The effect of an adapter's guidance gain: the same weights with it and without, from the same noise.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.guidance_gain ADAPTER 'guidance_scale=[1.5,2,3,4]'

Further arguments are those of pipeline.evaluate.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from pipeline.evaluate import evaluate
from stages.adapters import GuidanceAdapter
from stages.configuration.parsing import parse
from stages.evaluate.config import EvaluateConfig


def main(name_or_path: str, overrides: list[str]) -> None:
    adapter = GuidanceAdapter.from_pretrained(name_or_path)
    gain = adapter.metadata.guidance_gain
    adapter.metadata = replace(adapter.metadata, guidance_gain=1.0)
    with tempfile.TemporaryDirectory() as folder:
        without = Path(folder) / "without"
        adapter.save_pretrained(without)
        both = f"adapter_dir=[{name_or_path},{without}]"
        rows = evaluate(
            parse(EvaluateConfig, [both, f"output_dir={folder}/out", "methods=[one_pass]", *overrides])
        ).rows
    print(f"guidance gain {gain:.3f}\nscale  gain     gap closed  Frechet distance  over CFG's")
    for row in rows:
        if row["method"] == "cfg":
            cfg = row["frechet_distance"]
        if row["method"] == "one_pass":
            gained = "without" if row["adapter"] == without.name else "with"
            distance = row["frechet_distance"]
            print(
                f"{row['guidance_scale']:5g}  {gained:7}  {row['gap_closed']:10.4f}  {distance:16.2f}  {distance / cfg:10.3f}"
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
