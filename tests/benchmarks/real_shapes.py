"""Generation and training at real size with random weights: what recording costs, records per second, memory, step time.

python -m tests.benchmarks.real_shapes sd15|sdxl|tiny [batch size] [steps]

The real ones need a GPU with room for the model in half precision; `tiny` shows on a CPU that the script runs.

Prints one JSON object with the device's name. The text encoders are tiny ones of the right width, because what they cost
is paid once per batch; the UNet and the latents have the published shapes.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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

from stages.adapters import AdapterConfig
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.driver import Driver
from stages.generate.in_process import InProcessFleet
from stages.generate.plan import Plan
from stages.generate.scale import GUIDES
from stages.generate.teacher import Teacher
from stages.sampling import Request, sample, undecoded
from stages.train.config import TrainConfig
from stages.train.trainer import Trainer, peak_memory
from tests.families import NO_CHECKER, PROMPTS, clip, stable_diffusion_xl, vae
from tests.real_shapes import SD_UNET, SDXL_UNET

ROUNDS = 5


def build(family: str) -> Any:
    """The pipeline with a UNet of the published shape; `vae` only tells the latents' size."""
    torch.manual_seed(0)
    small = vae()
    small.register_to_config(block_out_channels=(8, 8, 8, 8))
    if family == "tiny":
        return stable_diffusion_xl()
    with torch.device("cuda"):
        unet = UNet2DConditionModel(**{"sd15": SD_UNET, "sdxl": SDXL_UNET}[family]).half()
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


def training(config: TrainConfig) -> dict[str, Any]:
    """A dozen training steps, the first two not counted."""
    forget_peak()
    trainer = Trainer(config)
    batches = iter(trainer.stream)
    times = [timed(lambda: trainer.train_step(next(batches))) for _ in range(12)]
    return {
        "training_step_seconds": statistics.median(times[2:]),
        "training_peak_bytes": peak_memory(trainer.device),
    }


def main(family: str, batch_size: str = "4", steps: str = "20") -> None:
    size = int(batch_size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build(family).save_pretrained(root / "teacher")
        (root / "prompts.txt").write_text("\n".join(PROMPTS))
        dtype = "float32" if family == "tiny" else "float16"
        config = GenerateConfig(
            TeacherConfig(str(root / "teacher"), torch_dtype=dtype), str(root / "data"),
            prompts=str(root / "prompts.txt"), num_trajectories=2 * size, num_inference_steps=int(steps),
            trajectories_per_unit=size, batch_size=size,
        )  # fmt: skip
        told = {
            "family": family,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "batch_size": size,
            **generation(config),
        }
        Driver(config).run(InProcessFleet(config))
        adapter = AdapterConfig(sites=["attention", "feed_forward"])
        told |= training(
            TrainConfig(str(root / "data"), str(root / "run"), adapter, train_batch_size=size, report_to="none")
        )
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
