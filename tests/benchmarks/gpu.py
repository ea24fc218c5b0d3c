"""Run every benchmark that needs a GPU, each in a process of its own, and write one JSON file. `gpu.sh` runs it.

python -m tests.benchmarks.gpu FILE [seconds in all] [tiny]

`tiny` selects small denoisers, which run on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stages.errors import UserError
from stages.train.quantization import check_quantization
from tests.benchmarks.measuring import device_name
from tests.benchmarks.one_pass_time import measured as one_pass_time
from tests.benchmarks.parts import Part, Row, run
from tests.benchmarks.real_shapes import recording, training
from tests.benchmarks.tiny_shapes import shape_named
from tests.benchmarks.training_memory import HELD, Setup, goal_of, measured, modelled

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "torchao", "bitsandbytes")


def metadata() -> Iterator[Row]:
    """Yield the device, and the versions of the packages."""
    gpu = torch.cuda.is_available()
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    yield {
        "device": device_name(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "python": sys.version.split()[0],
        "versions": versions,
    }


def training_memory(config: str, *ways: str) -> Iterator[Row]:
    """Yield the peak of a step for each way to hold the base: measured on a GPU, modelled elsewhere."""
    for held in ways or HELD:
        setup = Setup.holding(shape_named(config), held)
        row: Row = {"held": held, "goal": goal_of(setup)}
        try:
            check_quantization(setup.quantization, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
            yield row | {"peak": measured(setup) if torch.cuda.is_available() else modelled(setup)["peak"]}
        except UserError as error:  # a library is not installed
            yield row | {"error": str(error)}


def of_shape(work: Callable[..., Row], config: str, *settings: float) -> Iterator[Row]:
    yield work(shape_named(config), *settings)


def parts(tiny: bool) -> list[Part]:
    """Return the parts, the most valuable first; compiling takes longest and comes last."""
    prefix, lock, steps = ("tiny_", 0.1, 2) if tiny else ("", 6.0, 8)
    sdxl, dit, sd15, sd3 = (f"{prefix}{config}" for config in ("sdxl", "dit_xl_2_256", "sd15", "sd3"))
    few, many = (2, 4) if tiny else (4, 32)
    return [
        Part("metadata", 60, metadata),
        *(Part(f"one_pass_time {c}", 60, one_pass_time, (c, "eager", "", lock, (1, 8))) for c in (sdxl, dit, sd15, sd3)),
        Part(f"training_memory {sdxl}", 90, training_memory, (sdxl,)),
        Part(f"training_memory {sd3}", 30, training_memory, (sd3, "none", "nf4")),
        Part(f"training {sdxl}", 45, of_shape, (training, sdxl, few, lock)),
        Part(f"training {dit}", 45, of_shape, (training, dit, many, lock)),
        Part(f"recording {sdxl}", 45, of_shape, (recording, sdxl, few, steps, lock)),
        Part(f"recording {dit}", 45, of_shape, (recording, dit, many, steps, lock)),
        *(
            Part(f"compiled {c}", limit, one_pass_time, (c, "compiled", "", lock / 2, (1, 8)))
            for c, limit in ((dit, 90), (sdxl, 150), (sd15, 120), (sd3, 120))
        ),
        *([] if tiny else [Part("training_memory qwen_image", 120, training_memory, ("qwen_image", "nf4", "offload"))]),
    ]  # fmt: skip


def main(file: str, seconds: str = "540", size: str = "") -> None:
    result = run(Path(file), float(seconds), parts(tiny=size == "tiny"))
    for name, part in result["parts"].items():
        print(f"{name}: {part['seconds']} s, {len(part['rows'])} rows{', ' + part['error'] if part['error'] else ''}")


if __name__ == "__main__":
    main(*sys.argv[1:])
