"""Callbacks that change the guidance during a call: the adapter follows the scale; other changes get a warning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.adapters.adapter_call import AdapterCall
from stages.adapters.call_arguments import guiders_of, is_setting
from stages.adapters.user_warnings import warn

CALLBACK, INPUTS = "callback", "callback_on_step_end_tensor_inputs"
LATENTS = "latents"


def wrap_callbacks(arguments: dict[str, Any], pipe: Any, adapter_calls: list[AdapterCall], keyword: str | None) -> None:
    """Wrap each callback among the arguments of a call.

    Args:
        keyword: the name of the pipeline's scale; None if a guider holds it.
    """
    for name, value in list(arguments.items()):
        if name.startswith(CALLBACK) and callable(value):
            if INPUTS in arguments and hasattr(value, "tensor_inputs"):  # as pipelines do for diffusers' own callbacks
                arguments[INPUTS] = value.tensor_inputs
            arguments[name] = wrapped_callback(value, pipe, adapter_calls, keyword)


def wrapped_callback(
    callback: Callable[..., Any], pipe: Any, adapter_calls: list[AdapterCall], keyword: str | None
) -> Callable[..., Any]:
    """Wrap a callback: it reads the adapter's scale in the pipeline, and the adapter applies its changes.

    The pipeline stays at one pass. Conditions that come back with fewer rows, as from a callback that drops the
    unconditional half, stay as they were; of those that come back doubled, the conditional half is used.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        timestep = next((arg for arg in args if isinstance(arg, Tensor) and arg.ndim == 0), None)
        given = next((dict(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, dict)), {})
        before = settings_of(pipe)
        snapshot = Snapshot(expose_scales(pipe, adapter_calls, timestep), settings_of(pipe))
        try:
            returned = callback(*args, **kwargs)
            apply_changes(pipe, adapter_calls, snapshot, f"_{keyword}")
            warn_of_changes(
                pipe, snapshot, {f"_{keyword}", *(adapter_call.attribute for adapter_call in adapter_calls)}
            )
        finally:
            vars(pipe).update(before)
            for guider in guiders_of(pipe).values():
                guider.disable()
        return same_rows(returned, given) if isinstance(returned, dict) else returned

    return call


class Snapshot(NamedTuple):
    """What a callback finds: the scale of each adapter's call, and the pipeline's guidance attributes."""

    scales: list[Any]
    settings: dict[str, Any]


def settings_of(pipe: Any) -> dict[str, Any]:
    """Return the attributes that hold a call's guidance: `_guidance_scale` and others."""
    return {name: value for name, value in vars(pipe).items() if name.startswith("_") and is_setting(name)}


def expose_scales(pipe: Any, adapter_calls: list[AdapterCall], timestep: Tensor | None) -> list[Any]:
    """Write the adapters' scales into the pipeline and its guiders; return one for each adapter's call."""
    scales = [adapter_call.scale_at(timestep) for adapter_call in adapter_calls]
    for adapter_call, scale in zip(adapter_calls, scales, strict=True):
        if adapter_call.attribute in vars(pipe):
            vars(pipe)[adapter_call.attribute] = scale
    for guider in guiders_of(pipe).values():
        guider.enable()
        guider.guidance_scale = scales[0]
    return scales


def apply_changes(pipe: Any, adapter_calls: list[AdapterCall], snapshot: Snapshot, main: str) -> None:
    """Apply the scales that a callback changed in the pipeline or its guiders.

    Args:
        main: the attribute by which the pipeline decides whether it guides.
    """
    off, guiders = 1.0 - adapter_calls[0].offset, guiders_of(pipe).values()
    scale = vars(pipe).get(main)
    is_cut = scale is not snapshot.settings.get(main) and is_off(scale, off)
    is_cut = is_cut or not all(guider._enabled for guider in guiders)
    for adapter_call, before in zip(adapter_calls, snapshot.scales, strict=True):
        named = [vars(pipe).get(adapter_call.attribute, before), *(guider.guidance_scale for guider in guiders)]
        changed = [now for now in named if now is not before]
        if is_cut or changed:
            adapter_call.set_scale(off if is_cut else changed[0])


def is_off(scale: Any, off: float) -> bool:
    return scale is None or bool((torch.as_tensor(scale) <= off).all())


def warn_of_changes(pipe: Any, snapshot: Snapshot, scales: set[str]) -> None:
    """Warn of other guidance attributes that a callback changed: they have no effect in one pass."""
    for name, value in settings_of(pipe).items():
        before = snapshot.settings.get(name)
        if name not in scales and value is not before and value != before:
            warn(
                f"a callback set {name.removeprefix('_')} to {value}, which does not change an adapter's guidance: "
                "change guidance_scale, or detach the adapter for such calls"
            )


def same_rows(returned: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return a callback's result with as many rows of each condition as a single pass has."""
    if rows(returned.get(LATENTS)) != rows(given.get(LATENTS)):
        return returned
    fitted = dict(returned)
    for name, value in returned.items():
        had, has = rows(given.get(name)), rows(value)
        if name == LATENTS or not had or had == has:
            continue
        fitted[name] = value[-had:] if has > had else given[name]
    return fitted


def rows(value: Any) -> int:
    return len(value) if isinstance(value, Tensor) and value.ndim else 0
