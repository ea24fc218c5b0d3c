"""What an adapter does above its trained scales: guidance held at the highest, straight on up to twice that, or endlessly.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.outside_scales ADAPTER 'guidance_scale=[5.5,7,9]'

Further arguments are those of pipeline.evaluate.
"""

from __future__ import annotations

import math
import sys
import tempfile
import warnings

from stages.adapters import conditioning
from stages.configuration.parsing import parse
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Evaluation

FURTHEST = {"held": 1.0, "twice": 2.0, "endless": math.inf}


def main(name_or_path: str, overrides: list[str]) -> None:
    warnings.filterwarnings("ignore", message="guidance_scale .* is outside")
    shipped = conditioning.FURTHEST
    print("scale  goes on  gap closed  Frechet distance  CFG's")
    with tempfile.TemporaryDirectory() as folder:
        for name, furthest in FURTHEST.items():
            given = [f"adapter_dir={name_or_path}", f"output_dir={folder}/{name}", "methods=[one_pass]", *overrides]
            conditioning.FURTHEST = furthest
            try:
                show(name, Evaluation(parse(EvaluateConfig, given)))
            finally:
                conditioning.FURTHEST = shipped


def show(name: str, evaluation: Evaluation) -> None:
    for row in evaluation.run():
        if row["method"] == "cfg":
            cfg = row["frechet_distance"]
        if row["method"] == "one_pass":
            figures = f"{row['gap_closed']:10.3f}  {row['frechet_distance']:16.1f}  {cfg:5.1f}"
            print(f"{row['guidance_scale']:5g}  {name:7}  {figures}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
