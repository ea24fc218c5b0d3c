"""The arguments of a denoiser call: per-sample arguments, constants, and their conversion to records and back.

Records store per-sample arguments with the sample first, `[n, ...]`. A denoiser may take its samples in another
dimension (layers first), as several entries per sample (one per frame), or as a list with one tensor per sample.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.base.denoiser import STEP, flatten, unflatten

SHORT = 64  # a constant tensor with more elements is stored in base 64
LENGTH = "_length"  # suffix of a padded argument's name: the length of each sample before padding


@dataclass(frozen=True)
class Axis:
    """The position of the samples in an argument.

    Attributes:
        dim: the dimension that grows with the batch.
        rows: entries per sample in that dimension, side by side.
        listed: the argument is a list with one tensor per sample; their lengths may differ.
        shared: one value serves all samples of a call, which then have one length: the positions of a prompt's tokens.
    """

    dim: int = 0
    rows: int = 1
    listed: bool = False
    shared: bool = False

    def of_samples(self, value: Any) -> int:
        """The number of samples in a value."""
        return len(value) if self.listed else value.shape[self.dim] // self.rows

    def taken(self, value: Any, begin: int, end: int) -> Any:
        """Samples `begin` to `end` as `[end - begin, ...]`; a list where a listed argument's shapes differ."""
        if self.listed:
            taken = value[begin:end]
            same_shape = len({entry.shape for entry in taken}) == 1
            return torch.stack(taken) if same_shape else taken
        if self.shared:
            return value.expand(end - begin, *value.shape)
        entries = value.movedim(self.dim, 0)[begin * self.rows : end * self.rows]
        return entries if self.rows == 1 else entries.unflatten(0, (end - begin, self.rows))

    def put_back(self, value: Tensor, lengths: Tensor | None = None) -> Any:
        """The inverse of `taken`, from samples `[n, ...]`; `lengths` `[n]` cuts each sample to its own length."""
        if self.listed:
            entries = list(value.unbind(0))
            if lengths is None:
                return entries
            return [entry[:length] for entry, length in zip(entries, lengths.tolist(), strict=True)]
        if self.shared:
            return value[0]
        return (value if self.rows == 1 else value.flatten(0, 1)).movedim(0, self.dim)


@dataclass(frozen=True)
class Arguments:
    """The layout of a denoiser call's arguments, by their flat names (`stages.base.denoiser.flatten`).

    Attributes:
        latent, timestep: the denoiser's names for them.
        axes: of every per-sample argument, including the latent, and the timestep where each token has its own.
        constants: the other arguments, equal in every call, in the form of `encoded`.
        steps: the per-sample arguments that change from step to step, except the latent.
    """

    latent: str
    timestep: str
    axes: dict[str, Axis]
    constants: dict[str, Any]
    steps: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The layout as JSON."""
        return asdict(self) | {"steps": list(self.steps)}

    @property
    def conditions(self) -> list[str]:
        """The per-sample arguments that stay the same from step to step."""
        return [name for name in self.axes if name != self.latent and name not in self.steps]

    def rows(self, flat: dict[str, Any]) -> int:
        """The number of samples in a call; a doubled batch counts twice."""
        axis = self.axes[self.latent]
        return axis.of_samples(argument(flat, self.latent, axis))

    def samples(self, flat: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
        """The per-sample arguments of samples `begin` to `end`, `[end - begin, ...]` each; absent ones stay absent."""
        found = {name: (axis, argument(flat, name, axis)) for name, axis in self.axes.items()}
        return {name: axis.taken(value, begin, end) for name, (axis, value) in found.items() if value is not None}

    def timesteps(self, flat: dict[str, Any], n: int) -> Tensor:
        """The timestep of each of n samples `[n]`; tokens held fixed (a video's first frame) may have a lower one."""
        value = torch.as_tensor(flat[self.timestep])
        return (value.float() if value.is_floating_point() else value).max().expand(n)


def argument(flat: dict[str, Any], name: str, axis: Axis) -> Any:
    """An argument's value, as a list where the axis is listed; None where the call omits it."""
    if not axis.listed:
        return flat.get(name)
    entries: list[Any] = []
    while f"{name}.[{len(entries)}]" in flat:
        entries.append(flat[f"{name}.[{len(entries)}]"])
    return entries or None


@dataclass
class Caller:
    """Assembles the arguments of a denoiser call from a batch of records.

    Args:
        arguments: their layout.
        device: the call's device.
    """

    arguments: Arguments
    device: torch.device
    constants: dict[str, Callable[[int], Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.constants = {name: decoded(value, self.device) for name, value in self.arguments.constants.items()}

    def flat(self, latent: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Flat arguments of n samples: latent `[n, ...]`, timestep `[n]`, cond `[n, ...]` by name."""
        arguments, n = self.arguments, len(timestep)
        values = {arguments.latent: latent} | {name.removeprefix(STEP): value for name, value in cond.items()}
        given: dict[str, Any] = {}
        for name, axis in arguments.axes.items():
            if name in values:
                given |= flatten({name: axis.put_back(values[name], values.get(name + LENGTH))})
        return {arguments.timestep: timestep} | given | {name: value(n) for name, value in self.constants.items()}

    def nested(self, latent: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """The same arguments, nested as the denoiser takes them."""
        return unflatten(self.flat(latent, timestep, cond))


def stacked(entries: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Zero-pad tensors to one `[n, longest, ...]`; also their lengths `[n]`, or None where all are equal."""
    if len({entry.shape for entry in entries}) == 1:
        return torch.stack(entries), None
    return pad_sequence(entries, batch_first=True), torch.tensor([len(entry) for entry in entries])


def encoded(value: Any, rows: int) -> Any:
    """A constant argument of a call with `rows` rows, as JSON.

    A list that repeats one entry per row is stored as that entry, so that it fits a batch of any size.

    Raises:
        TypeError: JSON cannot represent it.
    """
    if isinstance(value, list) and len(value) == rows and all(entry == value[0] for entry in value):
        return {"each": _plain(value[0])}
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, tuple):
        return {"tuple": [_plain(entry) for entry in value]}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__}")


def _tensor(value: Tensor) -> dict[str, Any]:
    spec = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    value = value.detach().cpu().contiguous()
    if value.numel() <= SHORT and not value.is_complex():
        return {"tensor": value.tolist(), **spec}
    content = zlib.compress(value.flatten().view(torch.uint8).numpy().tobytes())
    return {"base64": base64.b64encode(content).decode(), **spec}


def decoded(value: Any, device: torch.device) -> Callable[[int], Any]:
    """The inverse of `encoded`: a function from the batch size to the argument."""
    if isinstance(value, dict) and "each" in value:
        entry = _whole(value["each"], device)
        return lambda n: [entry] * n
    whole = _whole(value, device)
    return lambda n: whole


def _whole(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_whole(entry, device) for entry in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_whole(entry, device) for entry in value["tuple"])
    dtype = getattr(torch, value["dtype"])
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=dtype, device=device).view(value["shape"])
    content = bytearray(zlib.decompress(base64.b64decode(value["base64"])))
    return torch.frombuffer(content, dtype=dtype).view(value["shape"]).to(device)
