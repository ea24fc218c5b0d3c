"""The hooks by which an adapter guides a denoiser: around its forward pass, and at the adapter's sites."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from stages.adapters.adapter_base import AdapterBase
from stages.adapters.attachment import attachment_of
from stages.adapters.wrappers import hookable_module, is_compiled, unwrapped
from stages.base.denoiser import floating_weight


def hook(adapter: AdapterBase, denoiser: nn.Module) -> None:
    """Add the hooks, if there are none; cast the sites to a pipeline's precision."""
    attachment = attachment_of(denoiser)
    if attachment.handles:
        return
    if adapter.pipelines:
        adapter.match_precision(floating_weight(denoiser).dtype)
    attachment.hooked_module = next((hookable_module(module) for module in adapter.wrapped_denoisers()), denoiser)
    for handle in _hooks(adapter, denoiser, attachment.hooked_module):
        attachment.handles.append(handle)
    _forget_compiled(adapter)


def unhook(adapter: AdapterBase, denoiser: nn.Module) -> None:
    if attachment_of(denoiser).unhook():
        _forget_compiled(adapter)
        adapter.restore_precision()


def _forget_compiled(adapter: AdapterBase) -> None:
    """Drop compiled code, which does not notice hooks added or removed later."""
    if any(is_compiled(module) for module in adapter.wrapped_denoisers()):
        torch.compiler.reset()


def _hooks(adapter: AdapterBase, denoiser: nn.Module, hooked_module: nn.Module) -> Iterator[RemovableHandle]:
    """Register plain functions: a deep copy of the denoiser shares them, and each is compiled by itself."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    beneath = (lambda module: module) if hooked_module is denoiser else unwrapped

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        changed = adapter.before_forward(beneath(module), {name: given[name] for name in names if name in given})
        return None if changed is None else ((), changed)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return adapter.after_forward(beneath(module), output)

    yield hooked_module.register_forward_pre_hook(before, with_kwargs=True)
    yield hooked_module.register_forward_hook(after, with_kwargs=True, always_call=True)
    yield from adapter.site_hooks(denoiser)
