"""One call of an attached pipeline: each adapter guides its denoiser, and the pipeline makes one pass without its own guidance."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.adapters.attachment import Context, attachment_of
from stages.adapters.call_arguments import CallArguments, guiders_of
from stages.adapters.callbacks import watch
from stages.adapters.guidance import Guidance, Scales, as_scales, scales_of_schedule
from stages.adapters.unconditional import unconditional_tokens
from stages.base.denoiser import bind_inputs, denoisers_of
from stages.base.patching import patched
from stages.errors import UserError

if TYPE_CHECKING:
    from stages.adapters.attaching import Attachable

SOME_GUIDANCE = 2.0  # a scale at which every pipeline runs its unconditional pass


class Controller:
    """What one call needs of the adapters on a pipeline: nothing of it is known to another call.

    Args:
        stock: the pipeline's own class; adapters: the adapters.
    """

    def __init__(self, stock: type[Any], adapters: tuple[Attachable, ...], pipe: Any, args: Any, kwargs: Any) -> None:
        self.stock, self.pipe = stock, pipe
        self.adapters = {adapter.component_in(pipe): adapter for adapter in adapters}
        for adapter in adapters:
            adapter.check_carried(pipe)
        self.call = CallArguments(pipe, inspect.signature(stock.__call__), dict(self.adapters), args, kwargs)

    def run(self) -> Any:
        """What the pipeline returns.

        Raises:
            UserError: the call asks for what one pass cannot do.
        """
        call = self.call
        call.warn()
        with ExitStack() as stack:
            # Always in the same order: two calls that wait for each other's denoiser would wait for ever.
            adapter_calls = [stack.enter_context(self._course(name).guiding()) for name in sorted(self.adapters)]
            call.switch_off()
            watch(call.arguments, self.pipe, adapter_calls, call.keyword)
            stack.enter_context(without_guiders(self.pipe))
            return self.stock.__call__(*call.bound.args, **call.bound.kwargs)

    def _course(self, component: str) -> AdapterCall:
        adapter = self.adapters[component]
        held = attachment_of(adapter.denoiser_in(self.pipe)).held
        scale = self.call.scale_of(component, None if held is None else held.guidance_scale)
        own = self.call.keyword_of(component)
        return AdapterCall(adapter, self.pipe, component, scale, f"_{own}", self._negative(adapter, component))

    def _negative(self, adapter: Attachable, component: str) -> dict[str, Tensor]:
        """What an adapter sees of the negative prompt, if it sees any."""
        if not adapter.sees_negative:
            return {}
        call = self.call
        keyword = {} if call.keyword is None else {call.keyword: SOME_GUIDANCE}
        guided = inspect.BoundArguments(call.bound.signature, call.arguments | keyword)
        if guided.arguments.get("negative_prompt") is None:
            guided.arguments |= {k: v for k, v in adapter.metadata["arguments"].items() if k == "negative_prompt"}
        return unconditional_tokens(
            self.pipe,
            list({**self.adapters, **denoisers_of(self.pipe)}),
            lambda: self.stock.__call__(*guided.args, **guided.kwargs),
            adapter.metadata["unconditional"],
            call.arguments.get("generator"),
        )


class AdapterCall:
    """How one adapter guides its denoiser through one call: at one scale, or from step to step.

    Args:
        scale: what the call asks for; what is open in this thread comes first.
        attribute: in which the pipeline keeps the scale, for callbacks.
        negative: tokens of the unconditional pass, where the adapter sees them.
    """

    def __init__(
        self,
        adapter: Attachable,
        pipe: Any,
        component: str,
        scale: Scales,
        attribute: str,
        negative: dict[str, Tensor],
    ) -> None:
        self.adapter, self.pipe, self.component = adapter, pipe, component
        self.denoiser, self.attribute = adapter.denoiser_in(pipe), attribute
        self.offset = float(adapter.metadata.get("scale_offset", 0))
        asked = adapter.asked
        self.schedule = None if asked is None or isinstance(asked, Context) else asked
        if isinstance(asked, Context):
            scales = asked.guidance.scales
        else:
            scales = as_scales(1.0 if self.schedule is not None else scale)[None]
            adapter.warn_outside(scales)
        self.guidance = Guidance(scales, negative=negative)
        self.waits = self.schedule is not None  # for the timesteps

    @contextmanager
    def guiding(self) -> Iterator[AdapterCall]:
        """Within it, the denoiser is guided."""
        with self.adapter.guiding(self.denoiser, self.guidance), ExitStack() as stack:
            if self.schedule is not None:
                stack.enter_context(self._by_step())
            yield self

    def change(self, scale: Scales) -> None:
        """Guide from now on at another scale, as the pipeline counts it."""
        scales = as_scales(scale, self.offset)[None]
        self.adapter.warn_outside(scales)
        self.guidance = Guidance(scales, negative=self.guidance.negative)
        self.adapter.go_on(self.guidance)
        self.adapter.steer(self.denoiser, self.guidance)

    def scale_at(self, timestep: Tensor | None) -> Any:
        """The scale that the pipeline would name at a timestep of the scheduler: a number, or a tensor `[images]`."""
        guidance = self.guidance
        if guidance.timesteps is not None:
            guidance = guidance.at_step(
                guidance.timesteps[0] if timestep is None else self._prepared(timestep.float().cpu())
            )
        return (guidance.scales[0] if guidance.one_scale is None else guidance.one_scale) - self.offset

    def _prepared(self, timesteps: Tensor) -> Tensor:
        """The scheduler's timesteps as the denoiser is told them."""
        metadata = self.adapter.metadata
        return timesteps * metadata["timestep_scale"] + metadata.get("timestep_offset", 0)

    @contextmanager
    def _by_step(self) -> Iterator[None]:
        """Within it, the guidance follows the timesteps as soon as the pipeline has set them."""
        scheduler, timestep = self.pipe.scheduler, self.adapter.metadata.get("timestep", "timestep")
        thread = threading.get_ident()

        def plan(set_timesteps: Callable[..., None], owner: Any, *args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            # Each once: some schedulers ask the denoiser twice at one timestep.
            timesteps = torch.unique_consecutive(scheduler.timesteps.float().cpu())
            assert self.schedule is not None
            scales = scales_of_schedule(self.schedule, timesteps)
            self.adapter.warn_outside(scales)
            self.guidance = Guidance(scales, self._prepared(timesteps), self.guidance.negative)
            self.adapter.go_on(self.guidance)
            if not self.guidance.is_uniform:  # else each step is fused as it comes
                self.adapter.steer(self.denoiser, self.guidance)
            self.waits = False

        @torch.compiler.disable
        def steer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != thread:  # a pass of another call, on the denoiser that both share
                return
            if self.waits:
                raise UserError(
                    f"{type(self.pipe).__name__} runs before its scheduler has set the timesteps, which a schedule of scales goes "
                    "by: name one guidance_scale for all steps"
                )
            guidance = self.guidance
            if guidance.timesteps is not None and guidance.is_uniform:
                self.adapter.steer(self.denoiser, guidance.at_step(bind_inputs(self.denoiser, args, kwargs)[timestep]))

        outermost = getattr(self.pipe, self.component)
        hook = outermost.register_forward_pre_hook(steer, with_kwargs=True, prepend=True)
        try:
            with patched(scheduler, "set_timesteps", plan):
                yield
        finally:
            hook.remove()


@contextmanager
def without_guiders(pipe: Any) -> Iterator[None]:
    """Within it, the guiders of a pipeline are out of the way; other pipelines may share them."""
    guiders = guiders_of(pipe)
    for name, guider in guiders.items():
        vars(pipe)[name] = copy.copy(guider)
        vars(pipe)[name].disable()
    try:
        yield
    finally:
        vars(pipe).update(guiders)
