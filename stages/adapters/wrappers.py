"""Wrappers that other libraries put around a denoiser, and changes that they make to its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn


def wrappers_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and each module it wraps: by `torch.compile`, peft, data parallelism or an engine."""
    while True:
        yield module
        if (inner := _inside(module)) is None:
            return
        module = inner


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the denoiser without wrappers."""
    *_, innermost = wrappers_of(module)
    return innermost


def hookable_module(module: nn.Module) -> nn.Module:
    """Return the innermost module whose hooks run in every call: peft calls `forward` directly, which runs no hooks."""
    innermost = module
    for layer in wrappers_of(module):
        if not _is_of_peft(innermost):
            innermost = layer
    return innermost


def is_compiled(module: nn.Module) -> bool:
    """Whether any part of a module is compiled."""
    compiled = any(getattr(layer, "_orig_mod", None) is not None for layer in wrappers_of(module))
    return compiled or any(part._compiled_call_impl is not None for part in module.modules())


def _inside(module: Any) -> nn.Module | None:
    if _is_of_peft(module):
        return module.get_base_model()
    inner = getattr(module, "_orig_mod", None)
    if inner is None and list(module._modules) == ["module"]:
        inner = module.module
    return inner if isinstance(inner, nn.Module) else None


def _is_of_peft(module: nn.Module) -> bool:
    return callable(getattr(type(module), "get_base_model", None))


def runs_fused_projections(module: nn.Module) -> bool:
    """Whether an attention module runs fused projections; `Attention` keeps its flag after unfusing."""
    if isinstance(module, Attention):
        return type(module.processor).__name__.startswith("Fused")
    return bool(getattr(module, "fused_projections", False))
