#!/usr/bin/env bash
# Bring the packages that a machine with torch, transformers, accelerate, peft and safetensors lacks for gpu.sh, as wheels for
# Python 3.12 on x86-64, in the versions of constraints.txt: tests/benchmarks/gpu_wheels.sh [Python]
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=tests/benchmarks/wheels
packages=(diffusers omegaconf antlr4-python3-runtime obstore torchao bitsandbytes pillow importlib-metadata lazy-importer zipp
  requests urllib3 charset-normalizer)
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)

rm -rf "$wheels"
"${1:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --dest "$wheels" --constraint constraints.txt \
  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none "${platforms[@]/#/--platform=}" "${packages[@]}"
du -sh "$wheels"
