"""The cost of one pass with an adapter over the unguided denoiser and over CFG, at a real denoiser's shape.

python -m tests.benchmarks.one_pass_time sd15|sdxl|dit_xl_2_256|sd3|tiny_...
    [eager|compiled] [latent size] [seconds] [batch size ...]

The measurements are interleaved. Weights are random: time does not depend on them. CFG is one pass of the doubled
batch. The default adapter runs fused into the base's weights, and unfused with hooks, beside the published baselines.
Prints one JSON object for each batch size.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.base.denoiser import uncompiled, unflatten
from tests.benchmarks.measuring import device_name, ratios, spread, take_turns, timed
from tests.benchmarks.tiny_shapes import shape_named
from tests.support.real_shapes import Shape, inputs_of, metadata_of, parameters

SCALES = (2.0, 5.0)
PASSES = 4  # of one measurement, queued one after the other as a sampler queues them
BATCH_SIZES = (1, 8)
DEFAULT, BASELINES = "lora", ("offset", "cross_attention", "embedding")
Clock = Callable[[], float]


def new_denoiser(shape: Shape) -> nn.Module:
    """Make a denoiser with random weights, on the GPU in bf16 if there is one."""
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        return shape.build().eval().requires_grad_(False)
    with torch.device("cuda"):
        return shape.build().eval().requires_grad_(False).to("cuda", torch.bfloat16)


def new_adapter(variant: str, shape: Shape, denoiser: nn.Module) -> GuidanceAdapter:
    """Make an adapter whose weights are not zero, like a trained one's, because kernels are faster on zeros."""
    like, inputs = next(denoiser.parameters()), inputs_of(shape, denoiser, 1)
    adapter = GuidanceAdapter.for_denoiser(AdapterConfig(variant), denoiser, metadata_of(shape), inputs)
    for parameter in adapter.sites.parameters():
        nn.init.normal_(parameter, std=1e-3)
    adapter.sites.to(like.dtype)
    return adapter.to(like.device).eval().requires_grad_(False)


def pass_clock(run: nn.Module, shape: Shape, n: int) -> Clock:
    """Return a function that times one pass of n samples, after one that does not count."""
    inputs = unflatten(inputs_of(shape, uncompiled(run), n)) | {"return_dict": False}

    @torch.no_grad()
    def measure() -> float:
        run(**inputs)
        return timed(lambda: [run(**inputs) for _ in range(PASSES)]) / PASSES

    return measure


@contextmanager
def attached(adapter: GuidanceAdapter, denoiser: nn.Module) -> Iterator[GuidanceAdapter]:
    """Attach the adapter within the context."""
    try:
        yield adapter.attach(denoiser)
    finally:
        adapter.detach()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


class Eager:
    """The denoiser without its adapter, with it fused and unfused, and with the baselines.

    The baselines run at batch size 1 only.
    """

    def __init__(self, shape: Shape, denoiser: nn.Module, n: int) -> None:
        self.denoiser = denoiser
        self.bare, self.cfg = (pass_clock(denoiser, shape, size) for size in (n, 2 * n))
        variants = [DEFAULT, *(BASELINES if n == 1 else ())]
        self.adapters = {variant: new_adapter(variant, shape, denoiser) for variant in variants}
        self.fuse_seconds: list[float] = []
        self.extra_bytes = 0

    def fused(self) -> float:
        """Time a pass after fusing another scale; keep the time of the fusing too."""
        with attached(self.adapters[DEFAULT], self.denoiser) as adapter:
            before = allocated()
            adapter.fuse(SCALES[0])
            self.extra_bytes = allocated() - before
            self.fuse_seconds.append(timed(lambda: adapter.fuse(SCALES[1])))
            return self.bare()

    def unfused(self, variant: str) -> float:
        with attached(self.adapters[variant], self.denoiser) as adapter, adapter.guidance_scale(SCALES[0]):
            return self.bare()

    def clocks(self) -> dict[str, Clock]:
        baselines: dict[str, Clock] = {
            name: lambda name=name: self.unfused(name) for name in self.adapters if name != DEFAULT
        }
        own: dict[str, Clock] = {
            "bare": self.bare, "cfg": self.cfg, "fused": self.fused, "unfused": lambda: self.unfused(DEFAULT)
        }  # fmt: skip
        return own | baselines


def eager(shape: Shape, denoiser: nn.Module, n: int, seconds: float) -> dict[str, Any]:
    """Measure every kind of pass at one batch size, in milliseconds and over the bare one and CFG, and the fusing."""
    kinds = Eager(shape, denoiser, n)
    taken = take_turns(kinds.clocks(), seconds)
    default = kinds.adapters[DEFAULT]
    return {
        "batch": n,
        "mode": "eager",
        **summarized(taken),
        "adapter_share": round(parameters(default) / parameters(denoiser), 5),
        "layers": len(default.shapes),
        "fuse_ms": spread([1000 * value for value in kinds.fuse_seconds]),
        "fused_extra_bytes": kinds.extra_bytes if torch.cuda.is_available() else None,
    }


def compiled(shape: Shape, denoiser: nn.Module, n: int, seconds: float) -> dict[str, Any]:
    """Compare the compiled denoiser without its adapter and with it fused to the eager one.

    Fused passes switch between the scales.
    """
    adapter, scales = new_adapter(DEFAULT, shape, denoiser), itertools.cycle(SCALES)
    torch.compiler.reset()
    backend = "inductor" if torch.cuda.is_available() else "eager"  # compiling for a CPU takes too long
    run: Any = torch.compile(denoiser, backend=backend, dynamic=False)
    with attached(adapter, run):
        adapter.fuse(SCALES[0])
        plain, clock = pass_clock(denoiser, shape, n), pass_clock(run, shape, n)
        before = counters["stats"]["unique_graphs"]
        compiling = timed(clock)
        graphs = counters["stats"]["unique_graphs"]

        def fused() -> float:
            adapter.fuse(next(scales))
            return clock()

        def bare() -> float:
            adapter.fuse(1.0)  # the base's own weights; unfusing would bring back the hooks
            return clock()

        taken = take_turns({"eager": plain, "bare": bare, "fused": fused}, seconds)
        recompiled = counters["stats"]["unique_graphs"] - graphs
    return {
        "batch": n,
        "mode": "compiled",
        **summarized(taken),
        "compile_seconds": round(compiling, 1),
        "graphs": graphs - before,
        "recompiled": recompiled,
    }


def summarized(taken: dict[str, list[float]]) -> dict[str, Any]:
    """Return the milliseconds and ratios of interleaved measurements."""
    bases = {f"over_{base}": taken[base] for base in ("bare", "cfg", "eager") if base in taken}
    kinds = {
        kind: {"ms": spread([1000 * value for value in values])}
        | {name: ratios(values, base) for name, base in bases.items() if base is not values}
        for kind, values in taken.items()
    }
    return {"rounds": len(taken["bare"]), "passes": kinds}


MODES = {"eager": eager, "compiled": compiled}


def measured(
    config: str, mode: str, latent_size: str, seconds: float, sizes: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each batch size."""
    shape = shape_named(config)
    if latent_size:
        shape = replace(shape, latent=(*shape.latent[:-2], int(latent_size), int(latent_size)))
    denoiser = new_denoiser(shape)
    for n in sizes:
        yield {"shape": shape.title, "latent": list(shape.latent), "device": device_name()} | MODES[mode](
            shape, denoiser, n, seconds
        )


def main(config: str, mode: str = "eager", latent_size: str = "", seconds: str = "10", *sizes: str) -> None:
    for row in measured(config, mode, latent_size, float(seconds), tuple(map(int, sizes)) or BATCH_SIZES):
        print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
