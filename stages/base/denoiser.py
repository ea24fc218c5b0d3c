"""The denoiser: the part of a pipeline that is called once or twice per step, and how its arguments are told apart."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import UserError

DENOISER_NAMES = ("unet", "transformer")  # what nearly all pipelines call it
TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio", "t")
CONTROLS = ("controlnet", "adapter")  # take a timestep too, and answer for no denoiser
MASK = "_mask"  # after the name of what it masks
STEP = "step."  # before the names of what changes from step to step
NEGATIVE = "negative."  # before the names of what the denoiser was given in its unconditional pass


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """(its name in the pipeline, mostly `"unet"` or `"transformer"`, the module): the part that is called in every step.

    Under another name it is the first component whose `forward` takes a timestep.
    """
    return next(iter(denoisers_of(pipe).items()))


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Every denoiser of a pipeline by name: some have one for the noisy timesteps and one for the others.

    Raises:
        UserError: there is none.
    """
    modules = {name: uncompiled(part) for name, part in _components(pipe).items() if isinstance(part, nn.Module)}
    usual = [name for name in DENOISER_NAMES if name in modules]
    found = usual or [name for name, module in modules.items() if _takes_timestep(module) and not _is_control(name)]
    if not found:
        raise UserError(
            f"{type(pipe).__name__} has neither a `unet` nor a `transformer`, nor another part that takes a timestep: it "
            "cannot be a teacher"
        )
    first = found[0]
    alike = [name for name in modules if name.startswith(f"{first}_") and type(modules[name]) is type(modules[first])]
    return {name: modules[name] for name in (first, *alike)}


def _components(pipe: Any) -> dict[str, Any]:
    return getattr(pipe, "components", None) or {name: getattr(pipe, name, None) for name in DENOISER_NAMES}


def _takes_timestep(module: nn.Module) -> bool:
    return not {*TIMESTEP_NAMES}.isdisjoint(inspect.signature(module.forward).parameters)


def _is_control(name: str) -> bool:
    return any(override in name for override in CONTROLS)


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
    """The arguments of one denoiser call by the denoiser's own names, flat (see `flatten`); the first of them is the latent.

    What is not given is left out, and None too, where it may be.
    """
    signature = inspect.signature(denoiser.forward)
    given = dict(signature.bind(*args, **kwargs).arguments)
    needed = [
        name for name, value in given.items() if value is None and signature.parameters[name].default is Parameter.empty
    ]
    return flatten(given) | dict.fromkeys(needed)


def samples_in(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Samples in one denoiser call, those of every part of a doubled batch counted: of its latent, a tensor or a list."""
    return len(next(iter(inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments.values())))


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
    """Tensors and constants by dotted names, in a list at `[i]`, in a tuple at `(i)`; lists of constants stay whole.

    `{"a": {"b": 1, "c": None}, "d": [x, (y, 2)]}` of tensors x and y becomes
    `{"a.b": 1, "d.[0]": x, "d.[1].(0)": y, "d.[1].(1)": 2}`.
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)) and _holds_tensors(value):
            left, right = "[]" if isinstance(value, list) else "()"
            flat |= flatten({f"{left}{i}{right}": entry for i, entry in enumerate(value)}, f"{prefix}{name}.")
        elif value is not None or name[0] in "[(":
            flat[prefix + name] = value
    return flat


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return any(map(_holds_tensors, value)) if isinstance(value, (list, tuple)) else isinstance(value, Tensor)


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return {name: _sequenced(value) for name, value in nested.items()}


def _sequenced(value: Any) -> Any:
    """With lists and tuples in place of dictionaries that stand for them."""
    if not isinstance(value, dict):
        return value
    entries = {name: _sequenced(entry) for name, entry in value.items()}
    kind = {"[": list, "(": tuple}.get(next(iter(entries), " ")[0])
    return (
        entries if kind is None else kind(entry for _, entry in sorted(entries.items(), key=lambda e: int(e[0][1:-1])))
    )


def predictions_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors `[rows, ...]` in what a denoiser returned, the first of them its prediction.

    Each may be a list with a tensor for each row. A model of pictures with sound predicts both.
    """
    parts = (
        (output,) if isinstance(output, Tensor) else output.to_tuple() if hasattr(output, "to_tuple") else tuple(output)
    )
    whole = [torch.stack(list(part)) if isinstance(part, (list, tuple)) and part else part for part in parts]
    return tuple(part for part in whole if isinstance(part, Tensor))


def part_of(prediction: Tensor, channels: int) -> Tensor:
    """The first so many channels (or tokens, or frames) of a prediction, or the last."""
    return prediction[:, :channels] if channels > 0 else prediction[:, channels:]


def as_target(predictions: Sequence[Tensor], channels: Sequence[int]) -> Tensor:
    """What the scheduler steps by of a prediction `[n, ...]`; of several predictions, all in one `[n, elements]`.

    Args:
        channels: of each, the first so many; a negative number is of the last, where the first frames are held.
    """
    stepped = [part_of(prediction, count) for prediction, count in zip(predictions, channels, strict=False)]
    return stepped[0] if len(stepped) == 1 else torch.cat([part.flatten(1) for part in stepped], 1)


def fingerprint(module: nn.Module) -> str:
    """A hash of every weight with its name, shape and dtype: equal weights, equal fingerprint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
