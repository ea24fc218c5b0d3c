"""One call of an attached pipeline: adapters guide the denoisers, and the pipeline runs one pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from stages.adapters.adapter_call import AdapterCall
from stages.adapters.call_arguments import CallArguments, guiders_of
from stages.adapters.callbacks import wrap_callbacks
from stages.adapters.denoiser_controller import DenoiserController
from stages.adapters.unconditional import unconditional_tokens
from stages.base.denoiser import denoisers_of
from stages.base.patching import replaced

SOME_GUIDANCE = 2.0  # every pipeline runs its unconditional pass at this scale


class PipelineCall:
    """One call of a pipeline with adapters; calls share no state.

    Args:
        stock: the pipeline's own class; controllers: of the guided denoisers, by component name.
    """

    def __init__(
        self, stock: type[Any], controllers: dict[str, DenoiserController], pipe: Any, args: Any, kwargs: Any
    ) -> None:
        self.stock, self.controllers, self.pipe = stock, controllers, pipe
        self.call = CallArguments(pipe, inspect.signature(stock.__call__), controllers, args, kwargs)

    def run(self) -> Any:
        """Run the pipeline and return its result.

        Raises:
            UserError: one pass cannot do what the call requests.
        """
        call = self.call
        call.warn()
        with ExitStack() as stack:
            # Always in the same order, so that two calls cannot deadlock on each other's denoiser.
            adapter_calls = [
                stack.enter_context(self._adapter_call(name).guiding()) for name in sorted(self.controllers)
            ]
            call.switch_off()
            wrap_callbacks(call.arguments, self.pipe, adapter_calls, call.keyword)
            stack.enter_context(without_guiders(self.pipe))
            return self.stock.__call__(*call.bound.args, **call.bound.kwargs)

    def _adapter_call(self, component: str) -> AdapterCall:
        controller = self.controllers[component]
        scale = self.call.scale_of(component, controller.fused_scale)
        own = self.call.keyword_of(component)
        return AdapterCall(controller, self.pipe, component, scale, f"_{own}", self._negative(controller))

    def _negative(self, controller: DenoiserController) -> dict[str, Tensor]:
        """Return the tokens of the negative prompt; nothing if the adapter does not see them."""
        if not controller.sees_negative:
            return {}
        call, place = self.call, controller.metadata.unconditional
        assert place is not None  # records with negative tokens have one
        keyword = {} if call.keyword is None else {call.keyword: SOME_GUIDANCE}
        guided = inspect.BoundArguments(call.bound.signature, call.arguments | keyword)
        if guided.arguments.get("negative_prompt") is None:
            guided.arguments |= {k: v for k, v in controller.metadata.arguments.items() if k == "negative_prompt"}
        return unconditional_tokens(
            self.pipe,
            list({**self.controllers, **denoisers_of(self.pipe)}),
            lambda: self.stock.__call__(*guided.args, **guided.kwargs),
            place,
            call.arguments.get("generator"),
        )


@contextmanager
def without_guiders(pipe: Any) -> Iterator[None]:
    """Replace a pipeline's guiders by disabled copies: other pipelines may share the originals."""
    with ExitStack() as stack:
        for name, guider in guiders_of(pipe).items():
            disabled = copy.copy(guider)
            disabled.disable()
            stack.enter_context(replaced(pipe, name, disabled))
        yield
