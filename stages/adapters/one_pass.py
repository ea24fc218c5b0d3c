"""One pass inside a stock pipeline: its `guidance_scale` goes to the adapter, and it runs without its own guidance."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.adapters.guidance import Guidance, Scales, as_scales, scales_of_schedule
from stages.adapters.unconditional import unconditional_tokens
from stages.denoiser import denoiser_of
from stages.sampling import scale_keyword

if TYPE_CHECKING:
    from stages.adapters.adapter import GuidanceAdapter

NO_GUIDANCE, SOME_GUIDANCE = 1.0, 2.0  # diffusers' pipelines run the unconditional pass only above 1


class OnePass:
    """Puts a subclass of the same name in the place of a pipeline's class, because Python looks `__call__` up there.

    `guidance_scale` is this adapter's also where the pipeline's own guidance goes by another name (`true_cfg_scale`).
    The subclass only turns `pipe(..., guidance_scale=w)` into the pipeline's own call at scale 1 with the adapter at w, so
    the pipeline makes a single, conditional pass per step. Components, configuration and saving stay the pipeline's own.
    """

    def __init__(self, pipe: Any, adapter: GuidanceAdapter) -> None:
        self.pipe, self.adapter, self.stock = pipe, adapter, type(pipe)
        self.cached: tuple[int, torch.Tensor | None] | None = None
        signature, keyword = inspect.signature(self.stock.__call__), scale_keyword(pipe)
        stock_call = self.stock.__call__

        def call(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(pipeline, *args, **kwargs)
            given = dict(bound.arguments)
            bound.apply_defaults()
            scale = bound.arguments[keyword]
            if keyword not in given and given.get("guidance_scale") is not None:
                scale = bound.arguments["guidance_scale"]
            negative = self._negative(pipeline, keyword, bound)
            bound.arguments[keyword] = NO_GUIDANCE
            with self.guided(pipeline, scale, bound.arguments, negative):
                return stock_call(*bound.args, **bound.kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        members = {"__call__": call, "__module__": self.stock.__module__, "__doc__": self.stock.__doc__}
        pipe.__class__ = type(self.stock.__name__, (self.stock,), members)

    def undo(self) -> None:
        self.pipe.__class__ = self.stock

    def cache(self, num_inference_steps: int, guidance_scale: Scales | None) -> None:
        """Cache the calls with so many steps and that scale."""
        self.cached = num_inference_steps, None if guidance_scale is None else as_scales(guidance_scale)

    @contextmanager
    def guided(
        self, pipe: Any, scale: Scales, arguments: dict[str, Any], negative: dict[str, Tensor]
    ) -> Iterator[None]:
        """Within it, the adapter guides one call of the pipeline; what the caller opened around the call comes first."""
        adapter = self.adapter
        adapter.check_carried(denoiser_of(pipe)[1])
        warn_of_negative_prompt(adapter, arguments)
        guidance = adapter.guidance or Guidance(as_scales(1.0 if adapter.schedule is not None else scale)[None])
        if adapter.guidance is None:
            adapter.warn_outside(guidance.scales)
        guidance.negative = negative
        cached = self._is_cached(guidance, arguments.get("num_inference_steps"))
        with adapter.in_force(guidance):
            if adapter.schedule is None and not cached:
                yield
                return
            with self._by_step(pipe.scheduler, guidance, cached):
                yield

    def _negative(self, pipe: Any, keyword: str, bound: inspect.BoundArguments) -> dict[str, Tensor]:
        """What the adapter sees of the negative prompt, if it sees any."""
        if not self.adapter.sees_negative:
            return {}
        arguments = inspect.BoundArguments(bound.signature, bound.arguments | {keyword: SOME_GUIDANCE})
        if arguments.arguments.get("negative_prompt") is None:
            arguments.arguments |= {k: v for k, v in self.adapter.about["arguments"].items() if k == "negative_prompt"}
        with self.adapter.in_force(Guidance(torch.ones(1, 1))):
            return unconditional_tokens(
                pipe,
                lambda: self.stock.__call__(*arguments.args, **arguments.kwargs),
                self.adapter.about["unconditional"],
                bound.arguments.get("generator"),
            )

    def _is_cached(self, guidance: Guidance, num_inference_steps: int | None) -> bool:
        if self.cached is None or self.cached[0] != num_inference_steps:
            return False
        return self.cached[1] is None or torch.equal(self.cached[1], guidance.scales[0])

    @contextmanager
    def _by_step(self, scheduler: Any, guidance: Guidance, cached: bool) -> Iterator[None]:
        """Within it, the guidance follows the timesteps as soon as the pipeline has set them."""
        adapter, set_timesteps = self.adapter, scheduler.set_timesteps

        @functools.wraps(set_timesteps)  # pipelines look at its signature
        def seen(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            # Each once: some schedulers ask the denoiser twice at one timestep.
            timesteps = torch.unique_consecutive(scheduler.timesteps.float().cpu())
            schedule = adapter.schedule
            alike = guidance.scales.expand(len(timesteps), -1)
            scales = alike if schedule is None else scales_of_schedule(schedule, timesteps)
            if schedule is not None:
                adapter.warn_outside(scales)
            adapter.guidance = Guidance(scales, timesteps * adapter.about["timestep_scale"], cached, guidance.negative)

        scheduler.set_timesteps = seen
        try:
            yield
        finally:
            del scheduler.set_timesteps


def warn_of_negative_prompt(adapter: GuidanceAdapter, arguments: dict[str, Any]) -> None:
    """Say once that a negative prompt does nothing, where the adapter was not trained to see it."""
    given = arguments.get("negative_prompt")
    prompts = [given] if isinstance(given, str) else list(given or [])
    trained = {"", adapter.about["arguments"].get("negative_prompt", "").strip()}
    unseen = [prompt for prompt in prompts if prompt.strip() not in trained]
    if arguments.get("negative_prompt_embeds") is not None:
        unseen.append("given as embeddings")
    if unseen and not adapter.warned and not adapter.sees_negative:
        adapter.warned = True
        warnings.warn(
            f"negative_prompt ({unseen[0]}) does nothing: this adapter was not trained to see negative prompts "
            "(adapter.conditions=[...,negative_tokens])",
            stacklevel=5,
        )
