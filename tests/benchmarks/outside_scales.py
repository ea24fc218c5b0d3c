"""What an adapter does above its trained scales: guidance held at the highest, straight on up to twice that, or endlessly.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.outside_scales ADAPTER 'guidance_scale=[5.5,7,9]'

Further arguments are those of pipeline.evaluate. It prints the rows of each rule as JSON.
"""

from __future__ import annotations

import json
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
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, furthest in FURTHEST.items():
            given = [f"adapter_dir={name_or_path}", f"output_dir={folder}/{name}", "methods=[one_pass]", *overrides]
            conditioning.FURTHEST = furthest
            try:
                found[name] = Evaluation(parse(EvaluateConfig, given)).run()
            finally:
                conditioning.FURTHEST = shipped
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
