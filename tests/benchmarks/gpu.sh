#!/usr/bin/env bash
# Run every benchmark that needs a GPU, in at most nine minutes and without a network, into one JSON file:
#   [tiny=1] tests/benchmarks/gpu.sh [file, by default gpu.json in $OUT] [Python]
# What this machine's Python lacks comes from the wheels beside this script (gpu_wheels.sh); what it has stays as it is.
# With tiny=1 small denoisers are taken, for a machine without a GPU.
set -euo pipefail
seconds=530
file=$(realpath "${1:-${OUT:-.}/gpu.json}")
python=${2:-python3}
cd "$(dirname "$0")/../.."
lacking=$(mktemp -d)
trap 'rm -rf "$lacking"' EXIT

# A folder on the path, and no virtual environment: one made from a virtual environment does not see that one's packages.
"$python" - tests/benchmarks/wheels/*.whl >"$lacking/wheels" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for wheel in sys.argv[1:]:
    try:
        version(Path(wheel).name.split("-")[0])
    except PackageNotFoundError:
        print(wheel)
PYTHON
"$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$lacking/site" --requirement "$lacking/wheels"

export PYTHONPATH="$PWD:$lacking/site" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error
"$python" -W ignore -m tests.benchmarks.gpu "$file" "$((seconds - SECONDS))" ${tiny:+tiny}
