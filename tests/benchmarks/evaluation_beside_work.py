"""How much another busy process slows an evaluation on the CPU.

    python -m tests.benchmarks.evaluation_beside_work ADAPTER num_samples=200 batch_size=20

Further arguments are those of pipeline.evaluate. Prints one JSON object: seconds of the whole command and of an image
without guidance and with it, alone and beside a busy loop; `null` if the command took longer than five minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT = 300.0
BUSY = [sys.executable, "-c", "while True: pass"]


def measure(overrides: list[str]) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pipeline.evaluate", *overrides, f"output_dir={folder}", "device=cpu"]
        start = time.monotonic()
        try:
            subprocess.run(command, check=True, timeout=LIMIT, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return None
        seconds = time.monotonic() - start
        none, cfg, *_ = json.loads((Path(folder) / "evaluation.json").read_bytes())["rows"]
    return {"seconds": seconds, **{row["method"]: row["seconds_per_image"] for row in (none, cfg)}}


def main(adapter: str, *overrides: str) -> None:
    given = [f"adapter_dir={adapter}", *overrides]
    alone = measure(given)
    with subprocess.Popen(BUSY) as busy:
        try:
            beside = measure(given)
        finally:
            busy.kill()
    print(json.dumps({"alone": alone, "beside a busy process": beside}, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
