"""What one pass with an adapter costs over the bare, unguided denoiser at a real denoiser's shape, the two taking turns.

python -m tests.benchmarks.one_pass_time sd15|sdxl|dit_xl_2_256|tiny [latent size] [rounds]

Weights are random: time does not depend on them. With the schedule cache, what it computes once per schedule is left out of a step's
time and told in steps of the bare denoiser. Prints one JSON object with the device's name.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.adapters.guidance import Guidance
from stages.denoiser import latent_name, unflatten
from tests.families import WIDTH, unet
from tests.real_shapes import SHAPES, TOKENS, Shape, about_of

SCALE, STEPS = 2.0, 30
MEASURED = [  # variant, with the schedule cache
    ("offset", True),
    ("offset", False),
    ("positional_offset", True),
    ("cross_attention", True),
    ("cross_attention", False),
    ("gated_mlp", True),
    ("modulated_low_rank", True),
    ("modulated_low_rank", False),
    ("lora", True),
    ("lora_fixed", False),
    ("embedding", False),
]
TINY = Shape("tiny", "tiny", unet, (4, 8, 8), {TOKENS: [7, WIDTH]})


def inputs_of(shape: Shape, denoiser: nn.Module) -> dict[str, Any]:
    """The arguments of one call for one sample, made up."""
    like = next(denoiser.parameters())
    cond = {
        name: torch.rand(1, *sizes).to(like) if sizes else torch.zeros(1, dtype=torch.long, device=like.device)
        for name, sizes in shape.cond.items()
    }
    latent = torch.randn(1, *shape.latent).to(like)
    timestep = torch.full((1,), 500, device=like.device)
    return {latent_name(denoiser): latent, "timestep": timestep, "return_dict": False, **unflatten(cond)}


def new_adapter(variant: str, shape: Shape, denoiser: nn.Module) -> GuidanceAdapter:
    adapter = GuidanceAdapter.for_denoiser(AdapterConfig(variant), denoiser, about_of(shape))
    adapter.sites.to(next(denoiser.parameters()).dtype)
    return adapter.to(next(denoiser.parameters()).device)


@contextmanager
def guided(adapter: GuidanceAdapter, denoiser: nn.Module, cached: bool) -> Iterator[None]:
    """Within it, the denoiser guides itself as in the middle of a schedule."""
    timesteps = torch.linspace(999, 1, STEPS) if cached else None
    adapter.attach(denoiser)
    with adapter.in_force(Guidance(torch.full((STEPS if cached else 1, 1), SCALE), timesteps, cached)):
        yield
    adapter.detach()


def timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(
    denoiser: nn.Module, inputs: dict[str, Any], rounds: int, adapters: dict[str, GuidanceAdapter]
) -> list[dict[str, Any]]:
    """For each of `MEASURED`, the ratios to the bare denoiser of so many rounds."""
    device = next(denoiser.parameters()).device

    def step() -> Tensor:
        with torch.no_grad():
            return denoiser(**inputs)[0]

    timed(step, device)
    rows = [{"variant": variant, "schedule_cache": cached, "ratios": [], "table": []} for variant, cached in MEASURED]
    for _ in range(rounds):
        for row in rows:
            bare = timed(step, device)
            with guided(adapters[row["variant"]], denoiser, row["schedule_cache"]):
                first = timed(step, device)
                row["ratios"].append(timed(step, device) / bare)
            row["table"].append(first / bare - row["ratios"][-1])
    return rows


def told(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the medians of its rounds."""
    ratios = sorted(row.pop("ratios"))
    row |= {"time": round(statistics.median(ratios), 3), "from": round(ratios[0], 3), "to": round(ratios[-1], 3)}
    table = statistics.median(row.pop("table"))
    return row | ({"table_in_steps": round(max(table, 0), 3)} if row["schedule_cache"] else {})


def main(config: str, latent_size: str = "", rounds: str = "5") -> None:
    shape = next(shape for shape in [TINY, *SHAPES] if shape.config == config)
    if latent_size:
        shape = replace(shape, latent=(*shape.latent[:-2], int(latent_size), int(latent_size)))
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    with torch.device("cuda" if gpu else "cpu"):
        denoiser = shape.build().eval().requires_grad_(False)
    if gpu:
        denoiser = denoiser.half()
    adapters = {variant: new_adapter(variant, shape, denoiser) for variant, _ in MEASURED}
    rows = measured(denoiser, inputs_of(shape, denoiser), int(rounds), adapters)
    print(
        json.dumps(
            {
                "shape": shape.title,
                "latent": shape.latent,
                "device": torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads",
                "rounds": int(rounds),
                "rows": [told(row) for row in rows],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
