"""The denoiser, the part of a pipeline that runs once or twice per step, and the names of its arguments."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import UserError

DENOISER_NAMES = ("unet", "transformer")  # its name in nearly all pipelines
TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio", "t")
CONTROLS = ("controlnet", "adapter")  # parts of these names take a timestep too, but are no denoisers
MASK = "_mask"  # suffix of the masked argument's name
STEP = "step."  # prefix of arguments that change from step to step
NEGATIVE = "negative."  # prefix of the denoiser's arguments in its unconditional pass


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """(name in the pipeline, mostly `"unet"` or `"transformer"`; module) of the first denoiser.

    Without a component of these names, the denoiser is the first one whose `forward` takes a timestep.
    """
    return next(iter(denoisers_of(pipe).items()))


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Every denoiser of a pipeline by name: some pipelines use a second one for the less noisy timesteps.

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
    others = [name for name in modules if name.startswith(f"{first}_") and type(modules[name]) is type(modules[first])]
    return {name: modules[name] for name in (first, *others)}


def _components(pipe: Any) -> dict[str, Any]:
    return getattr(pipe, "components", None) or {name: getattr(pipe, name, None) for name in DENOISER_NAMES}


def _takes_timestep(module: nn.Module) -> bool:
    return not {*TIMESTEP_NAMES}.isdisjoint(inspect.signature(module.forward).parameters)


def _is_control(name: str) -> bool:
    return any(part in name for part in CONTROLS)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wraps, or the module itself."""
    return getattr(module, "_orig_mod", module)


def forget_compiled(module: nn.Module) -> None:
    """Have a compiled module compiled again: compiled code ignores hooks that are added later."""
    if uncompiled(module) is not module or any(part._compiled_call_impl is not None for part in module.modules()):
        torch.compiler.reset()


def floating_weight(denoiser: nn.Module) -> Tensor:
    """A weight in the precision in which the denoiser computes; those of a quantised one may be packed in bytes."""
    return next(parameter for parameter in denoiser.parameters() if parameter.is_floating_point())


def latent_name(denoiser: nn.Module) -> str:
    """The denoiser's name for its latent: `sample` in a UNet, `hidden_states` in a transformer."""
    return next(iter(inspect.signature(denoiser.forward).parameters))


def bind_inputs(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one denoiser call, flat (see `flatten`), by the denoiser's own names; the latent is first.

    Arguments that the call omits are absent; so are those that are None and optional.
    """
    signature = inspect.signature(denoiser.forward)
    given = dict(signature.bind(*args, **kwargs).arguments)
    needed = [
        name for name, value in given.items() if value is None and signature.parameters[name].default is Parameter.empty
    ]
    return flatten(given) | dict.fromkeys(needed)


def samples_in(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of samples in a denoiser call, whose latent is a tensor or a list; a doubled batch counts twice."""
    return len(next(iter(inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments.values())))


def negative_tokens(inputs: dict[str, Any], latent: str, rows: slice) -> dict[str, Tensor]:
    """The token embeddings `[n, length, width]` of an unconditional pass and their masks, named `negative.NAME`.

    Args:
        inputs: of a denoiser call, flat; latent: the latent's name.
        rows: the unconditional part of the batch.
    """
    given = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != latent}
    tokens = {name: value for name, value in given.items() if value.ndim == 3 and value.is_floating_point()}
    masks = {name: value.bool() for name, value in given.items() if value.ndim == 2 and name.endswith(MASK)}
    return {NEGATIVE + name: value[rows] for name, value in (tokens | masks).items()}


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested arguments as one dictionary by dotted names: `[i]` for a list's entry, `(i)` for a tuple's.

    Lists of constants stay whole. None is dropped, except from a sequence.

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
    """Turn dictionaries of `[i]` or `(i)` names back into lists and tuples."""
    if not isinstance(value, dict):
        return value
    entries = {name: _sequenced(entry) for name, entry in value.items()}
    kind = {"[": list, "(": tuple}.get(next(iter(entries), " ")[0])
    return (
        entries if kind is None else kind(entry for _, entry in sorted(entries.items(), key=lambda e: int(e[0][1:-1])))
    )


def predictions_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors `[rows, ...]` in a denoiser's output, its prediction first.

    Each may come as a list with one tensor per row. A model of video with sound predicts both.
    """
    parts = (
        (output,) if isinstance(output, Tensor) else output.to_tuple() if hasattr(output, "to_tuple") else tuple(output)
    )
    whole = [torch.stack(list(part)) if isinstance(part, (list, tuple)) and part else part for part in parts]
    return tuple(part for part in whole if isinstance(part, Tensor))


def part_of(prediction: Tensor, channels: int) -> Tensor:
    """The first `channels` channels (or tokens, or frames) of a prediction; the last ones if negative, all if 0."""
    return prediction[:, :channels] if channels > 0 else prediction[:, channels:]


def as_target(predictions: Sequence[Tensor], channels: Sequence[int]) -> Tensor:
    """The part of a prediction `[n, ...]` that the scheduler steps by; several are joined to `[n, elements]`.

    Args:
        channels: of each prediction, as for `part_of`; negative where the first frames are held fixed.
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
