"""One pass in a stock pipeline: the adapter gets its `guidance_scale`, and its own guidance is switched off.

A subclass of the same name replaces the pipeline's class, where Python looks `__call__` up. Components, configuration
and saving stay the pipeline's own.
"""

from __future__ import annotations

import copy
import functools
import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from stages.adapters.adapter_base import AdapterBase
from stages.adapters.call_arguments import SCALE, keyword_of
from stages.adapters.denoiser_controller import controller_in, controllers_of
from stages.adapters.pipeline_call import PipelineCall
from stages.errors import UserError

ATTACHED = "_guidance_adapters"  # the attribute of a pipeline's class that holds them


@dataclass(frozen=True)
class AttachedAdapters:
    """The adapters on a pipeline, at most one for each denoiser, and the pipeline's stock class."""

    stock: type[Any]
    adapters: tuple[AdapterBase, ...] = ()


def adapters_of(pipe: Any) -> AttachedAdapters:
    return getattr(type(pipe), ATTACHED, AttachedAdapters(type(pipe)))


def add_to_pipeline(pipe: Any, adapter: AdapterBase) -> None:
    """Add an adapter to those that guide a pipeline's calls."""
    adapters = adapters_of(pipe)
    others = tuple(other for other in adapters.adapters if other is not adapter)  # a copied pipeline has it already
    pipe.__class__ = guided_class(pipe, AttachedAdapters(adapters.stock, (*others, adapter)))


def remove_from_pipeline(pipe: Any, adapter: AdapterBase) -> None:
    """Remove an adapter; the last one restores the stock class."""
    adapters = adapters_of(pipe)
    others = tuple(other for other in adapters.adapters if other is not adapter)
    pipe.__class__ = guided_class(pipe, AttachedAdapters(adapters.stock, others)) if others else adapters.stock


def guided_class(pipe: Any, adapters: AttachedAdapters) -> type[Any]:
    stock = adapters.stock

    def call(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        return PipelineCall(stock, controllers_of(pipeline, adapters.adapters), pipeline, args, kwargs).run()

    @functools.wraps(stock.save_pretrained)
    def save_pretrained(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for adapter in adapters.adapters:
                stack.enter_context(controller_in(pipeline, adapter).unfused())
            return stock.save_pretrained(pipeline, *args, **kwargs)

    call.__signature__ = signature_of(pipe, stock)  # type: ignore[attr-defined]
    members = {
        ATTACHED: adapters,
        "__call__": call,
        "save_pretrained": save_pretrained,
        "__copy__": shallow_copy,
        "__deepcopy__": deep_copy,
        "__reduce_ex__": refuse_to_pickle,
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
    }
    return type(stock.__name__, (stock,), members)


def signature_of(pipe: Any, stock: type[Any]) -> inspect.Signature:
    """Return the stock call's signature, with `guidance_scale` added if only a guider holds the scale."""
    signature = inspect.signature(stock.__call__)
    if keyword_of(pipe, signature) is not None:
        return signature
    *parameters, last = signature.parameters.values()
    scale = inspect.Parameter(SCALE, inspect.Parameter.KEYWORD_ONLY, default=None)
    rest = [scale, last] if last.kind is last.VAR_KEYWORD else [last, scale]
    return signature.replace(parameters=[*parameters, *rest])


def shallow_copy(pipe: Any) -> Any:
    copied = object.__new__(type(pipe))
    vars(copied).update(vars(pipe))
    return copied


def deep_copy(pipe: Any, memo: dict[int, Any]) -> Any:
    copied = memo[id(pipe)] = object.__new__(type(pipe))
    vars(copied).update(copy.deepcopy(vars(pipe), memo))
    return copied


def refuse_to_pickle(pipe: Any, protocol: Any) -> Any:
    raise UserError(
        f"a {type(pipe).__name__} with an adapter attached cannot be pickled: detach the adapter first, and attach it "
        "again after loading"
    )
