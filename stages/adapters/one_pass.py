"""One pass inside a stock pipeline: its `guidance_scale` goes to the adapter, and it runs without its own guidance."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.adapters.guidance import Guidance, Scales, as_scales, scales_of_schedule
from stages.adapters.riding import ride_of
from stages.adapters.unconditional import unconditional_tokens
from stages.denoiser import bind_inputs, denoiser_of
from stages.sampling import scale_keyword

if TYPE_CHECKING:
    from stages.adapters.attaching import Attachable

NO_GUIDANCE, SOME_GUIDANCE = 1.0, 2.0  # diffusers' pipelines run the unconditional pass only above 1


class OnePass:
    """Puts a subclass of the same name in the place of a pipeline's class, because Python looks `__call__` up there.

    `guidance_scale` is this adapter's also where the pipeline's own guidance goes by another name (`true_cfg_scale`).
    The subclass only turns `pipe(..., guidance_scale=w)` into the pipeline's own call at scale 1 with the adapter at w, so
    the pipeline makes a single, conditional pass per step. Components, configuration and saving stay the pipeline's own.
    """

    def __init__(self, pipe: Any, adapter: Attachable) -> None:
        self.pipe, self.adapter, self.stock = pipe, adapter, type(pipe)
        signature, keyword = inspect.signature(self.stock.__call__), scale_keyword(pipe)
        stock_call = self.stock.__call__

        def call(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
            denoiser = denoiser_of(pipeline)[1]
            adapter.check_carried(denoiser)
            bound = signature.bind(pipeline, *args, **kwargs)
            given = dict(bound.arguments)
            bound.apply_defaults()
            with ride_of(denoiser).lock:
                scale = bound.arguments[keyword]
                if keyword not in given:
                    held, other = ride_of(denoiser).fused, given.get("guidance_scale")
                    scale = other if other is not None else held.guidance_scale if held else scale
                negative = self._negative(pipeline, keyword, bound)
                bound.arguments[keyword] = NO_GUIDANCE
                with self.guided(pipeline, scale, bound.arguments, negative):
                    return stock_call(*bound.args, **bound.kwargs)

        @functools.wraps(self.stock.save_pretrained)
        def save_pretrained(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
            with adapter.guiding(denoiser_of(pipeline)[1], Guidance(torch.ones(1, 1))):
                return self.stock.save_pretrained(pipeline, *args, **kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        members = {
            "__call__": call,
            "save_pretrained": save_pretrained,
            "__module__": self.stock.__module__,
            "__doc__": self.stock.__doc__,
        }
        pipe.__class__ = type(self.stock.__name__, (self.stock,), members)

    def undo(self) -> None:
        self.pipe.__class__ = self.stock

    @contextmanager
    def guided(
        self, pipe: Any, scale: Scales, arguments: dict[str, Any], negative: dict[str, Tensor]
    ) -> Iterator[None]:
        """Within it, the adapter guides one call of the pipeline; what the caller opened around the call comes first."""
        adapter, denoiser = self.adapter, denoiser_of(pipe)[1]
        warn_of_negative_prompt(adapter, arguments)
        guidance = adapter.guidance or Guidance(as_scales(1.0 if adapter.schedule is not None else scale)[None])
        if adapter.guidance is None:
            adapter.warn_outside(guidance.scales)
        guidance.negative = negative
        with adapter.guiding(denoiser, guidance):
            if adapter.schedule is None:
                yield
            else:
                with self._by_step(pipe, guidance):
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

    @contextmanager
    def _by_step(self, pipe: Any, guidance: Guidance) -> Iterator[None]:
        """Within it, the guidance follows the timesteps as soon as the pipeline has set them."""
        adapter, (name, denoiser), set_timesteps = self.adapter, denoiser_of(pipe), pipe.scheduler.set_timesteps

        @functools.wraps(set_timesteps)  # pipelines look at its signature
        def seen(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            # Each once: some schedulers ask the denoiser twice at one timestep.
            timesteps = torch.unique_consecutive(pipe.scheduler.timesteps.float().cpu())
            assert adapter.schedule is not None
            scales = scales_of_schedule(adapter.schedule, timesteps)
            adapter.warn_outside(scales)
            adapter.guidance = Guidance(scales, timesteps * adapter.about["timestep_scale"], guidance.negative)
            if not adapter.guidance.is_uniform:
                adapter.steer(denoiser, adapter.guidance)

        @torch.compiler.disable
        def steer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert adapter.guidance is not None
            if adapter.guidance.is_uniform:
                adapter.steer(denoiser, adapter.guidance.of_step(bind_inputs(denoiser, args, kwargs)["timestep"]))

        pipe.scheduler.set_timesteps = seen
        hook = getattr(pipe, name).register_forward_pre_hook(steer, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            hook.remove()
            del pipe.scheduler.set_timesteps


def warn_of_negative_prompt(adapter: Attachable, arguments: dict[str, Any]) -> None:
    """Say once that a negative prompt does nothing, where the adapter was not trained to see it."""
    given = arguments.get("negative_prompt")
    prompts = [given] if isinstance(given, str) else list(given or [])
    trained = {"", adapter.about["arguments"].get("negative_prompt", "").strip()}
    unseen = [prompt for prompt in prompts if prompt.strip() not in trained]
    if arguments.get("negative_prompt_embeds") is not None:
        unseen.append("given as embeddings")
    if unseen and not adapter.sees_negative and not adapter.warned_of_negative:
        adapter.warned_of_negative = True
        warnings.warn(
            f"negative_prompt ({unseen[0]}) does nothing: this adapter was not trained to see negative prompts "
            "(adapter.conditions=[...,negative_tokens])",
            stacklevel=5,
        )
