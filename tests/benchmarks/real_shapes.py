"""Generation and training at real size with random weights: what recording costs, records per second, memory, step time.

python -m tests.benchmarks.real_shapes sd15|sdxl|tiny [batch size] [steps] [image size] [variant]

SDXL needs a GPU with room for the model in half precision; `tiny` shows on a CPU that the script runs.

Prints one JSON object with the device's name. The text encoders are tiny ones of the right width, because what they cost
is paid once per batch; the UNet and, by default, the latents have the published shapes. A training step is told over its floor: the
frozen base's own forward pass, and its backward pass down to every site. On a GPU, a step that makes it wait ends the measurement.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.base import choose_device
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.driver import Driver
from stages.generate.in_process import InProcessFleet
from stages.generate.plan import Plan
from stages.generate.scale import GUIDES
from stages.generate.teacher import Teacher
from stages.sampling import Request, sample, undecoded
from stages.train.config import TrainConfig
from stages.train.objective import squared_error
from stages.train.trainer import Trainer, peak_memory
from tests.families import NO_CHECKER, PROMPTS, clip, stable_diffusion_xl, vae
from tests.real_shapes import SD_UNET, SDXL_UNET

ROUNDS = 5
DTYPE = "float16" if torch.cuda.is_available() else "float32"


def build(family: str) -> Any:
    """The pipeline with a UNet of the published shape; the VAE only tells the latents' size."""
    torch.manual_seed(0)
    small = vae(blocks=4)
    if family == "tiny":
        return stable_diffusion_xl()
    with torch.device(choose_device("auto")):
        unet = UNet2DConditionModel(**{"sd15": SD_UNET, "sdxl": SDXL_UNET}[family]).to(getattr(torch, DTYPE))
    if family == "sd15":
        return StableDiffusionPipeline(
            vae=small, unet=unet, scheduler=DDIMScheduler(steps_offset=1), **clip(width=768), **NO_CHECKER
        )
    one, two = clip(width=768), clip(projection=True, width=1280)
    return StableDiffusionXLPipeline(
        vae=small, unet=unet, scheduler=EulerDiscreteScheduler(), **one,
        tokenizer_2=two["tokenizer"], text_encoder_2=two["text_encoder"],
    )  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def generation(config: GenerateConfig) -> dict[str, Any]:
    """The recorded batch and the bare pipeline on the same batch, taking turns."""
    plan = Plan(config)
    teacher, unit = Teacher(config, plan.conditions[0]), plan.unit(0)
    trajectories, steps = unit.trajectories, config.num_inference_steps
    request = Request([t.condition for t in trajectories], [t.seed for t in trajectories], steps, {})

    def bare() -> None:
        with undecoded(teacher.pipe):
            sample(teacher.pipe, request, GUIDES)

    bare()
    forget_peak()
    pairs = [(timed(lambda: list(teacher.run(unit))), timed(bare)) for _ in range(ROUNDS)]
    return {
        "recorded_over_bare": statistics.median(recorded / alone for recorded, alone in pairs),
        "records_per_second": len(trajectories) * steps / statistics.median(recorded for recorded, _ in pairs),
        "generation_peak_bytes": peak_memory(teacher.device),
    }


@contextmanager
def unadapted(adapter: GuidanceAdapter, denoiser: nn.Module) -> Iterator[None]:
    """Within it each site adds a number in place of the adapter, so that gradients are wanted where the adapter wants them."""
    number = torch.zeros((), device=denoiser.device, requires_grad=True)

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        first, *others = output if isinstance(output, tuple) else (output,)
        first = first + number.to(first.dtype)
        return (first, *others) if isinstance(output, tuple) else first

    adapter.detach()
    handles = [denoiser.get_submodule(name).register_forward_hook(add) for name in adapter.shapes]
    yield
    for handle in handles:
        handle.remove()
    adapter.attach(denoiser)


@contextmanager
def never_waiting() -> Iterator[None]:
    """Within it, what makes a GPU wait is an error."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def training(config: TrainConfig) -> dict[str, Any]:
    """Training steps and their floor, taking turns; the first two pairs are not counted."""
    trainer = Trainer(config)
    batches, student = iter(trainer.stream), trainer.student
    batch = next(batches).to(trainer.device, student.dtype)

    def floor() -> None:
        squared_error(student.predict(batch, guided=False), batch.target).mean().backward()

    def step() -> None:
        with never_waiting():
            trainer.train_step(batches)

    forget_peak()
    pairs = []
    for _ in range(2 + ROUNDS):
        taken = timed(step)
        with unadapted(trainer.adapter, student.denoiser):
            pairs.append((taken, timed(floor)))
    ratios = sorted(taken / least for taken, least in pairs[2:])
    return {
        "variant": config.adapter.variant,
        "training_step_over_floor": statistics.median(ratios),
        "from": ratios[0],
        "to": ratios[-1],
        "training_step_seconds": statistics.median(taken for taken, _ in pairs[2:]),
        "training_peak_bytes": peak_memory(trainer.device),
    }


def main(family: str, batch_size: str = "4", steps: str = "20", image_size: str = "", variant: str = "lora") -> None:
    size, side = int(batch_size), int(image_size) if image_size else None
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build(family).save_pretrained(root / "teacher")
        (root / "prompts.txt").write_text("\n".join(PROMPTS))
        config = GenerateConfig(
            TeacherConfig(
                str(root / "teacher"), torch_dtype="float32" if family == "tiny" else DTYPE, height=side, width=side
            ),
            str(root / "data"),
            prompts=str(root / "prompts.txt"), num_trajectories=2 * size, num_inference_steps=int(steps),
            trajectories_per_unit=size, batch_size=size,
        )  # fmt: skip
        gpu = torch.cuda.is_available()
        told = {
            "family": family,
            "device": torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads",
            "batch_size": size,
            **generation(config),
        }
        Driver(config).run(InProcessFleet(config))
        run = TrainConfig(
            str(root / "data"), str(root / "run"), AdapterConfig(variant), train_batch_size=size, report_to="none",
            validation_share=0.5,
        )  # fmt: skip
        told |= training(run)
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
