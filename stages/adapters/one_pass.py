"""One pass inside a stock pipeline: its `guidance_scale` goes to the adapter, and it runs without its own guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from stages.sampling import scale_keyword

NO_GUIDANCE = 1.0  # diffusers' pipelines run the unconditional pass only above it


class OnePass:
    """Puts a subclass of the same name in the place of a pipeline's class, because Python looks `__call__` up there.

    `guidance_scale` is this adapter's also where the pipeline's own guidance goes by another name (`true_cfg_scale`).
    The subclass only turns `pipe(..., guidance_scale=w)` into the pipeline's own call at scale 1 with the adapter at w, so
    the pipeline makes a single, conditional pass per step. Components, configuration and saving stay the pipeline's own.
    """

    def __init__(self, pipe: Any, guided: Callable[[float], AbstractContextManager[None]]) -> None:
        """
        Args:
            guided: a context within which the pipeline's denoiser guides itself at a scale.
        """
        self.pipe, self.stock = pipe, type(pipe)
        signature, keyword = inspect.signature(self.stock.__call__), scale_keyword(pipe)
        stock_call = self.stock.__call__

        def call(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(pipeline, *args, **kwargs)
            given = dict(bound.arguments)
            bound.apply_defaults()
            scale = bound.arguments[keyword]
            if keyword not in given and given.get("guidance_scale") is not None:
                scale = bound.arguments["guidance_scale"]
            bound.arguments[keyword] = NO_GUIDANCE
            with guided(scale):
                return stock_call(*bound.args, **bound.kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        members = {"__call__": call, "__module__": self.stock.__module__, "__doc__": self.stock.__doc__}
        pipe.__class__ = type(self.stock.__name__, (self.stock,), members)

    def undo(self) -> None:
        self.pipe.__class__ = self.stock
