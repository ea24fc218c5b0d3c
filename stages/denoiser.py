"""The denoiser: the part of a pipeline that is called once or twice per step, and how its arguments are told apart."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import UserError

DENOISER_NAMES = ("unet", "transformer")
MASK = "_mask"  # after the name of what it masks
NEGATIVE = "negative."  # before the names of what the denoiser was given in its unconditional pass


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """(`"unet"` or `"transformer"`, the module): the part of a pipeline that is called in every step."""
    for name in DENOISER_NAMES:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, uncompiled(module)
    raise UserError(f"{type(pipe).__name__} has neither a `unet` nor a `transformer`: it cannot be a teacher")


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself where `torch.compile` wraps it."""
    return getattr(module, "_orig_mod", module)


def forget_compiled(module: nn.Module) -> None:
    """Have a compiled module compiled again: what is compiled does not notice hooks that come later."""
    if uncompiled(module) is not module or any(part._compiled_call_impl is not None for part in module.modules()):
        torch.compiler.reset()


def latent_name(denoiser: nn.Module) -> str:
    """What the denoiser calls its latent: `sample` in a UNet, `hidden_states` in a transformer."""
    return next(iter(inspect.signature(denoiser.forward).parameters))


def bind_inputs(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one denoiser call by the denoiser's own names; the first of them is the latent.

    What is not given is left out, and dictionaries are flattened: `added_cond_kwargs.text_embeds`.
    """
    return flatten(dict(inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments))


def negative_tokens(inputs: dict[str, Any], latent: str, rows: slice) -> dict[str, Tensor]:
    """The token embeddings `[n, length, width]` of an unconditional pass and their masks, named `negative.NAME`.

    Args:
        inputs: of a denoiser call, flat; latent: what the latent is called among them.
        rows: of the unconditional part of the batch.
    """
    given = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != latent}
    tokens = {name: value for name, value in given.items() if value.ndim == 3 and value.is_floating_point()}
    masks = {name: value.bool() for name, value in given.items() if value.ndim == 2 and name.endswith(MASK)}
    return {NEGATIVE + name: value[rows] for name, value in (tokens | masks).items()}


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1, "c": None}}` to `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def fingerprint(module: nn.Module) -> str:
    """A hash of every weight with its name, shape and dtype: equal weights, equal fingerprint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
