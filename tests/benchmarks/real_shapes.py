"""Recording and training at full size with random weights: cost of recording, records per second, step time, memory.

python -m tests.benchmarks.real_shapes sd15|sdxl|dit_xl_2_256|tiny_... [batch size] [steps] [variant]

SDXL needs a GPU; `tiny_sdxl` checks the script on a CPU. Prints one JSON object with the device's name.

The text encoders are tiny ones of the right width, because their cost is paid once per batch; the denoiser and the
latents have the published shapes. Records are made up and stay in memory. A training step is compared with its floor:
the frozen base's own forward pass, and its backward pass down to every site.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stages.adapters import GuidanceAdapter
from stages.base.sampling import Request, sample, undecoded
from stages.generate.finding import find_layout
from stages.generate.recorder import record
from stages.generate.scale import GUIDES
from stages.train.objective import squared_error
from tests.benchmarks.measuring import device_name, ratios, spread, take_turns, timed
from tests.benchmarks.one_pass_time import DEFAULT, new_denoiser
from tests.benchmarks.tiny_shapes import shape_named
from tests.benchmarks.training_memory import Setup, Training, records
from tests.support.families import NO_CHECKER, PROMPTS, clip, vae
from tests.support.real_shapes import POOLED, TOKENS, Shape

MADE_UP = 4  # batches of records
SECONDS = 10.0  # per measurement


def pipeline(shape: Shape) -> Any:
    """Make a pipeline with a denoiser of this shape; the VAE only gives the size of the latents."""
    denoiser, small = new_denoiser(shape), vae(blocks=4)
    if TOKENS not in shape.cond:
        pipe: Any = DiTPipeline(transformer=denoiser, vae=small, scheduler=DDIMScheduler())
    elif POOLED not in shape.cond:
        pipe = StableDiffusionPipeline(
            vae=small, unet=denoiser, scheduler=DDIMScheduler(steps_offset=1), **clip(width=shape.cond[TOKENS][1]),
            **NO_CHECKER,
        )  # fmt: skip
    else:
        width = shape.cond[POOLED][0]
        one, two = clip(width=shape.cond[TOKENS][1] - width), clip(projection=True, width=width)
        pipe = StableDiffusionXLPipeline(
            vae=small, unet=denoiser, scheduler=EulerDiscreteScheduler(), **one,
            tokenizer_2=two["tokenizer"], text_encoder_2=two["text_encoder"],
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(denoiser.device, denoiser.dtype)


def recording(shape: Shape, batch_size: int, steps: int, seconds: float) -> dict[str, Any]:
    """Record a batch of trajectories and move it to the CPU, interleaved with the bare pipeline on the same batch."""
    pipe = pipeline(shape)
    conditions = [{"class_label": i, "prompt": PROMPTS[i % len(PROMPTS)]} for i in range(batch_size)]
    request = Request(conditions, list(range(batch_size)), steps, {})
    layout = find_layout(pipe, Request(conditions[:1], [0], steps, {}))

    def bare() -> None:
        with undecoded(pipe):
            sample(pipe, request, GUIDES)

    def recorded() -> None:
        with record(pipe, layout, batch_size) as recorder:
            bare()
        made = recorder.recording()
        for tensor in (made.latent, made.target, *made.cond.values()):
            tensor.half().cpu()

    bare()
    forget_peak()
    taken = take_turns({"recorded": lambda: timed(recorded), "bare": lambda: timed(bare)}, seconds)
    return {
        "batch_size": batch_size,
        "steps": steps,
        "rounds": len(taken["bare"]),
        "recorded_over_bare": ratios(taken["recorded"], taken["bare"]),
        "records_per_second": spread([batch_size * steps / value for value in taken["recorded"]]),
        "peak_bytes": peak(),
    }


@contextmanager
def unadapted(adapter: GuidanceAdapter, denoiser: nn.Module) -> Iterator[None]:
    """Replace the adapter at each site by adding a number, so that gradients reach the same sites."""
    number = torch.zeros((), device=next(denoiser.parameters()).device, requires_grad=True)

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


def waiting_in(step: Callable[[], None]) -> str | None:
    """Return the reason why a step makes the GPU wait, or None, also without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def training(shape: Shape, batch_size: int, seconds: float, variant: str = DEFAULT) -> dict[str, Any]:
    """Measure training steps and their floor, interleaved, with a base in bf16 on a GPU and without memory savings."""
    device, precision = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "no")
    training = Training(Setup(shape, variant, "none", precision, gradient_checkpointing=False), device, batch_size)
    student, made_up = training.student, [records(shape, batch_size) for _ in range(MADE_UP)]
    batches = itertools.cycle([batch.pin() for batch in made_up] if device == "cuda" else made_up)

    def step() -> None:
        training.batch = next(batches).to(device, student.dtype)
        training.step()

    def backward() -> None:
        squared_error(student.predict(training.batch, guided=False), training.batch.target).mean().backward()

    def floor() -> float:
        with unadapted(student.adapter, student.denoiser):
            return timed(backward)

    step()
    floor()
    with unadapted(student.adapter, student.denoiser):
        least = operations(backward)
    forget_peak()
    taken = take_turns({"step": lambda: timed(step), "floor": floor}, seconds)
    return {
        "variant": variant,
        "batch_size": batch_size,
        "rounds": len(taken["step"]),
        "step_ms": spread([1000 * value for value in taken["step"]]),
        "steps_per_second": spread([1 / value for value in taken["step"]]),
        "records_per_second": spread([batch_size / value for value in taken["step"]]),
        "step_over_floor": ratios(taken["step"], taken["floor"]),
        "operations_over_floor": round(operations(step) / least, 4),
        "peak_bytes": peak(),
        "waits_for": waiting_in(step),
    }


def operations(work: Callable[[], object]) -> int:
    """Return the floating-point operations of `work` in matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> int | None:
    """Return the peak bytes of the GPU's memory since the last reset, or None without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def main(config: str, batch_size: str = "4", steps: str = "20", variant: str = DEFAULT) -> None:
    shape, size = shape_named(config), int(batch_size)
    info = {"shape": shape.title, "device": device_name()}
    info |= {
        "recording": recording(shape, size, int(steps), SECONDS),
        "training": training(shape, size, SECONDS, variant),
    }
    print(json.dumps(info, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
