"""The memory of a training step at a real denoiser's shape: measured on a GPU, and by a model.

python -m tests.benchmarks.training_memory SHAPE [variant] [none|int8|fp8|int4|nf4|offload ...]
python -m tests.benchmarks.training_memory goals    tests/benchmarks/results/memory/goals.json, by the model alone

SHAPE is sdxl, sd15, dit_xl_2_256 or tiny_sdxl. The step trains on one record, with the base in bf16 and gradient
checkpointing, once for each way to hold the base: plain, with quantised linear layers, or offloaded. Weights are
random: memory does not depend on them. Prints one JSON object, in bytes; exit status 1 if a peak is above its goal.

The model is that of stages/train/memory.py.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.train.base import PRECISION
from stages.train.batch import Batch
from stages.train.config import QUANTIZATIONS, TrainConfig
from stages.train.defaults import RunConfig, complete
from stages.train.memory import default_dtype, fake_tensors, hold, modellable, step_bytes
from stages.train.objective import squared_error
from stages.train.offloading import offload
from stages.train.optimization import Optimization
from stages.train.quantization import quantize
from stages.train.student import Student
from tests.benchmarks.tiny_shapes import shape_named
from tests.support.real_shapes import Shape, arguments_of, conditions_of, inputs_of, metadata_of

GB = 10**9
HELD = (*QUANTIZATIONS, "offload")
GOALS = {
    ("sdxl", "lora"): {"none": 12 * GB, "int8": 8 * GB, "nf4": 6 * GB},
    ("sd3", "lora"): {"none": 8 * GB},
    ("qwen_image", "lora"): {"nf4": 24 * GB, "offload": 24 * GB},
}
STEPS = 3


@dataclass(frozen=True)
class Setup:
    """A denoiser's shape, and the options of training that affect its memory."""

    shape: Shape
    variant: str = "lora"
    quantization: str = "none"
    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = True
    enable_group_offload: bool = False

    @classmethod
    def holding(cls, shape: Shape, held: str, variant: str = "lora") -> Setup:
        """Return the options for one of the ways to hold the base."""
        if held == "offload":
            return cls(shape, variant, enable_group_offload=True)
        return cls(shape, variant, held)

    @property
    def held(self) -> str:
        return "offload" if self.enable_group_offload else self.quantization

    @property
    def config(self) -> RunConfig:
        options = {name: value for name, value in vars(self).items() if name not in ("shape", "variant")}
        return modellable(complete(TrainConfig(adapter=AdapterConfig(self.variant), **options), records=1, processes=1))


class Training:
    """A student with random weights, an optimizer and a batch of made-up records, one by default."""

    def __init__(self, setup: Setup, device: str, batch_size: int = 1, fake: bool = False) -> None:
        precision = PRECISION.get(setup.mixed_precision, torch.float32)
        # Only the layers of a base that fits no GPU are built there.
        with torch.device("cpu" if setup.enable_group_offload else device), default_dtype(precision):
            denoiser = setup.shape.build()
        denoiser.eval().requires_grad_(False)
        layers = denoiser
        if fake:
            with torch.device("meta"):  # where a trial of its layers needs no values
                layers = setup.shape.build()
        inputs = inputs_of(setup.shape, layers, 3)
        if fake:
            hold(denoiser, setup.quantization)
        else:
            quantize(denoiser, setup.quantization, device)
            if setup.enable_group_offload:
                offload(denoiser, device)
        adapter = GuidanceAdapter.for_denoiser(AdapterConfig(setup.variant), layers, metadata_of(setup.shape), inputs)
        if device != "cpu":  # a fake module cannot be moved
            adapter.to(device)
        self.student = Student(
            denoiser,
            adapter,
            arguments_of(setup.shape, denoiser),
            [setup.shape.latent[0]],
            setup.mixed_precision,
        )
        if setup.gradient_checkpointing:
            self.student.checkpoint_gradients()
        self.batch = records(setup.shape, batch_size).to(device, precision)
        self.optimization = Optimization(adapter, setup.config, device)

    def loss(self) -> Tensor:
        return squared_error(self.student.predict(self.batch), self.batch.target).mean()

    def step(self) -> None:
        self.optimization.backward(self.loss())
        self.optimization.step()


def records(shape: Shape, n: int) -> Batch:
    latent, target = torch.randn(n, *shape.latent), torch.randn(n, *shape.latent)
    cond = conditions_of(shape, n, torch.device("cpu"), torch.float32)
    return Batch(
        latent, torch.tensor([500] * n), target, torch.tensor([2.0] * n), cond
    )  # `torch.tensor` keeps its values on a fake tensor


def modelled(setup: Setup) -> dict[str, Any]:
    """Return the bytes of a step's parts and its peak, by the model; see `step_bytes`."""
    with fake_tensors(1):
        training = Training(setup, "cpu", fake=True)
        return step_bytes(training.student, setup.config, training.loss)


def measured(setup: Setup) -> int:
    """Return the peak bytes that a few steps allocate on the GPU."""
    gc.collect()
    training = Training(setup, "cuda")
    training.step()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        training.step()
    return torch.cuda.max_memory_allocated()


def goal_of(setup: Setup) -> int | None:
    return GOALS.get((setup.shape.config, setup.variant), {}).get(setup.held)


def row(setup: Setup) -> dict[str, Any]:
    """Return a row with `peak`, measured if possible, and its `goal`, or None."""
    model = modelled(setup)
    peak = measured(setup) if torch.cuda.is_available() else model["peak"]
    return {"held": setup.held, "peak": peak, "goal": goal_of(setup), "model": model}


def goals() -> dict[str, Any]:
    """Return the modelled peak of each setup that has a goal."""
    rows = []
    for (config, variant), limits in GOALS.items():
        for held, goal in limits.items():
            setup = Setup.holding(shape_named(config), held, variant)
            rows.append({"shape": setup.shape.title, "held": held, "peak": modelled(setup)["peak"], "goal": goal})
    return {"rows": rows}


def main(config: str, variant: str = "lora", *ways: str) -> None:
    if config == "goals":
        print(json.dumps(goals(), indent=2))
        return
    shape = shape_named(config)
    rows = [row(Setup.holding(shape, held, variant)) for held in ways or HELD]
    info = {
        "shape": shape.title,
        "variant": variant,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: the peak is the model's",
        "rows": rows,
    }
    print(json.dumps(info, indent=2))
    if any(row["goal"] is not None and row["peak"] > row["goal"] for row in rows):
        sys.exit(f"{shape.title}, {variant}: the peak is above its goal")


if __name__ == "__main__":
    main(*sys.argv[1:])
