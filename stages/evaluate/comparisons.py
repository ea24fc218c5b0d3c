"""The sampling methods to compare, each through the stock pipeline and from the same noise."""

from __future__ import annotations

import inspect
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import Tensor, nn

from stages.adapters import GuidanceAdapter
from stages.adapters.metadata import AdapterMetadata
from stages.base.denoiser import denoiser_of, denoisers_of
from stages.base.hooks import SchedulerStep, count_evaluations, scheduler_steps
from stages.base.loading import diffusers_class, first_line, load_pipeline, new_guider, quiet, resolve
from stages.base.sampling import (
    Request,
    guider_of,
    sample,
    scale_keyword,
    synchronize,
    undecoded,
)
from stages.errors import UsageError, UserError
from stages.evaluate.identity import scaling_of
from stages.evaluate.methods import (
    CFG,
    NONE,
    ONE_PASS,
    check_compared,
    interval_of,
    rule_of,
    uses_adapter,
)
from stages.evaluate.partial_guidance import partly_guided
from stages.evaluate.rules import Interval


@dataclass(frozen=True)
class Setting:
    """A method at a guidance scale; `none` is always at 1. `adapter` names the adapter of a method of one pass."""

    method: str
    guidance_scale: float
    adapter: str | None = None


@dataclass(frozen=True)
class Samples:
    """Final latents `[n, c, h, w]`, as passed to the VAE, and their cost without decoding.

    Attributes:
        steps: every step of the scheduler, with the latents that it received.
        fused: for one pass, whether the scale was fused into the weights, so that only the base's modules ran.
    """

    latents: Tensor
    denoiser_evaluations: int
    seconds: float
    steps: list[SchedulerStep]
    fused: bool | None = None


def settings(
    scales: Sequence[float], methods: Sequence[str] = (ONE_PASS,), adapters: Sequence[str | None] = (None,)
) -> list[Setting]:
    """The settings in order: no guidance once, then at every scale CFG and the methods, one pass once per adapter."""
    if not scales or not all(1 < scale < float("inf") for scale in scales):
        raise UsageError(
            f"guidance_scale={list(scales)}: name scales above 1; 1 is no guidance, which is always included"
        )
    check_compared(methods)
    found = [Setting(NONE, 1.0)]
    for scale in scales:
        found.append(Setting(CFG, scale))
        for method in methods:
            found += [Setting(method, scale, name) for name in (adapters if uses_adapter(method) else (None,))]
    return list(dict.fromkeys(found))


def measured_scales(compared: Sequence[Setting]) -> dict[float, Setting]:
    """The settings that measure CFG, by scale; at scale 1 that is no guidance."""
    return {setting.guidance_scale: setting for setting in compared if setting.method in (NONE, CFG)}


def load_pair(
    adapter_dir: str, name_or_path: str | None, device: str, lora: str | None = None
) -> tuple[Any, GuidanceAdapter]:
    """Load the pipeline, with a LoRA if one is named, and the adapter, detached."""
    adapter = GuidanceAdapter.from_pretrained(adapter_dir)
    pipe = load_recorded(adapter.metadata, name_or_path, device)
    if lora is not None:
        load_lora(pipe, lora)
    return pipe, fit_to_pipeline(adapter, pipe)


def recorded_class(metadata: AdapterMetadata) -> type | None:
    """The class of the pipeline that `load_recorded` loads; None if only loading it tells."""
    kind = ModularPipeline if metadata.teacher.guider else getattr(diffusers, str(metadata.base.pipeline_class), None)
    return kind if isinstance(kind, type) and issubclass(kind, (DiffusionPipeline, ModularPipeline)) else None


def load_recorded(metadata: AdapterMetadata, name_or_path: str | None, device: str) -> Any:
    """Load the teacher that an adapter's metadata describes: its pipeline class, scheduler and guider.

    Args:
        metadata: of an adapter.
        name_or_path: another base in place of the teacher's; its scheduler keeps its own configuration.
    """
    base, teacher = metadata.base, metadata.teacher
    own = {"config": base.config, "revision": base.revision, "variant": base.variant}
    source: dict[str, Any] = {"config": base.config or base.pretrained_model_name_or_path} if name_or_path else own
    kind = "ModularPipeline" if teacher.guider else base.pipeline_class
    if not hasattr(diffusers, str(kind)):
        warnings.warn(
            f"diffusers {diffusers.__version__} has no {kind}, which made the records: using the base's own class",
            stacklevel=2,
        )
        kind = None
    pipe: Any = load_pipeline(
        name_or_path or base.pretrained_model_name_or_path, device=device, pipeline_class=kind, **source
    )
    if teacher.guider:
        pipe.update_components(guider=new_guider(dict(teacher.guider)))
    if teacher.scheduler_class is not None:
        scheduler = diffusers_class(teacher.scheduler_class, "the scheduler of the records")
        own = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
        config = own if name_or_path else teacher.scheduler_config
        if type(pipe.scheduler) is not scheduler or json.dumps(own, default=str) != json.dumps(config, default=str):
            pipe.scheduler = scheduler.from_config(config)
    return pipe


def load_lora(pipe: Any, name_or_path: str) -> None:
    """
    Raises:
        UserError: the pipeline takes no LoRA, or the LoRA cannot be loaded.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"lora={name_or_path}: {type(pipe).__name__} takes no LoRA: leave it out")
    wanted = f"for {type(pipe).__name__}, or leave it out"
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "While injecting the PEFT adapters", RuntimeWarning)  # to fewer layers
            pipe.load_lora_weights(resolve(name_or_path))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"lora={name_or_path}: cannot be loaded: {first_line(error)}: name a folder, a file or a hub id of a LoRA "
            f"{wanted}"
        ) from error
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    if not any(scaling_of(module) for part in parts for module in part.modules()):
        raise UserError(f"lora={name_or_path}: changes nothing of this pipeline: name a LoRA {wanted}")


def fit_to_pipeline(adapter: GuidanceAdapter, pipe: Any) -> GuidanceAdapter:
    """Move the adapter to the pipeline's device, and check that it fits the base before anything is sampled."""
    adapter.attach(pipe)
    adapter.detach()
    return adapter.to(pipe.device)


def arguments_of(pipe: Any, adapter: GuidanceAdapter) -> dict[str, Any]:
    """The further arguments of the adapter's teacher that this pipeline takes, too."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    has_guider = guider_of(pipe) is not None  # a modular pipeline takes every argument of its blocks
    return {name: value for name, value in adapter.metadata.arguments.items() if name in parameters or has_guider}


def sample_setting(pipe: Any, adapter: GuidanceAdapter, setting: Setting, request: Request) -> Samples:
    """Sample one image per condition by a setting; each image's noise has its own seed."""
    n = len(request.seeds)
    with (
        undecoded(pipe) as latents,
        count_evaluations(*denoisers_of(pipe).values()) as count,
        scheduler_steps(pipe, n) as steps,
        guiding(pipe, adapter, setting, steps, n),
    ):
        synchronize(pipe)
        start = time.perf_counter()
        sample(pipe, *with_guidance(pipe, adapter.metadata, setting, request))
        synchronize(pipe)
        seconds = (latents.ended or time.perf_counter()) - start
    return Samples(latents[0], count[0], seconds, steps, adapter.fused if uses_adapter(setting.method) else None)


def with_guidance(pipe: Any, metadata: AdapterMetadata, setting: Setting, request: Request) -> tuple[Request, float]:
    """The request and the scale to pass to the pipeline; for no guidance, with all arguments that switch it off."""
    offset = metadata.scale_offset
    guides_itself = setting.method != ONE_PASS or not isinstance(pipe, ModularPipeline)
    if setting.method != NONE and guides_itself:
        return request, setting.guidance_scale - offset
    off = dict(metadata.no_guidance)
    parameters = inspect.signature(type(pipe).__call__).parameters
    scale = off.pop(scale_keyword(pipe), 1.0 - offset) if guider_of(pipe) is None else 1.0 - offset
    return replace(request, arguments=request.arguments | {k: v for k, v in off.items() if k in parameters}), scale


@contextmanager
def guiding(
    pipe: Any, adapter: GuidanceAdapter, setting: Setting, steps: list[SchedulerStep], n: int
) -> Iterator[None]:
    """Within the context, a pipeline call at the setting's scale uses the setting's method."""
    rule, interval = rule_of(setting.method), interval_of(setting.method)
    is_modular = isinstance(pipe, ModularPipeline)  # its call has no guidance_scale argument to intercept
    if setting.method == ONE_PASS:
        adapter.attach(denoiser_of(pipe)[1] if is_modular else pipe)
        try:
            with adapter.guidance_scale(setting.guidance_scale) if is_modular else nullcontext():
                yield
        finally:
            adapter.detach()
    elif interval is not None:
        if is_modular:
            raise UserError(
                f"{type(pipe).__name__}: a modular pipeline takes no schedule of scales: leave {setting.method} out of "
                "methods=[...]"
            )
        adapter.attach(pipe)
        try:
            with adapter.guidance_schedule(scale_inside(pipe, interval, setting.guidance_scale)):
                yield
        finally:
            adapter.detach()
    elif rule is not None:
        with partly_guided(pipe, adapter.metadata, setting.method, rule, steps, n):
            yield
    else:
        yield


def scale_inside(pipe: Any, interval: Interval, scale: float) -> Callable[[int, float], float]:
    """A schedule for an adapter: the scale inside an interval of the timesteps, and no guidance outside."""

    def scale_at(number: int, timestep: float) -> float:
        return scale if interval.contains(number, len(torch.unique_consecutive(pipe.scheduler.timesteps))) else 1.0

    return scale_at
