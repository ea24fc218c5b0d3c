"""The arguments of a denoiser call: which belong to its samples, which are constant, and the way to records and back.

A record holds each argument that belongs to a sample with the sample first, `[n, ...]`, whatever the denoiser wants: samples
in another dimension (layers first), several entries for each (one per frame), or a list with a tensor for each.
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

SHORT = 64  # a constant tensor of more numbers is told in base 64
LENGTH = "_length"  # after the name of what was padded: how long each sample's own was


@dataclass(frozen=True)
class Axis:
    """Where an argument has its samples.

    Attributes:
        dim: the dimension that grows with the batch.
        rows: entries in it for each sample, side by side.
        listed: a list with a tensor for each sample, perhaps of different lengths.
        shared: one for all samples of a call, which are of one length then: positions of a prompt's tokens.
    """

    dim: int = 0
    rows: int = 1
    listed: bool = False
    shared: bool = False

    def of_samples(self, value: Any) -> int:
        """How many samples a value has."""
        return len(value) if self.listed else value.shape[self.dim] // self.rows

    def taken(self, value: Any, begin: int, end: int) -> Any:
        """A run of samples `[end - begin, ...]`; of a list whose tensors differ in shape, a list."""
        if self.listed:
            taken = value[begin:end]
            alike = len({entry.shape for entry in taken}) == 1
            return torch.stack(taken) if alike else taken
        if self.shared:
            return value.expand(end - begin, *value.shape)
        entries = value.movedim(self.dim, 0)[begin * self.rows : end * self.rows]
        return entries if self.rows == 1 else entries.unflatten(0, (end - begin, self.rows))

    def put_back(self, value: Tensor, lengths: Tensor | None = None) -> Any:
        """What `taken` came from, of samples `[n, ...]`; with lengths `[n]`, of so many entries each."""
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
    """How the arguments of a denoiser call are laid out, by their flat names (`stages.base.denoiser.flatten`).

    Attributes:
        latent, timestep: what the denoiser calls them.
        axes: of every argument that belongs to the samples, the latent among them, the timestep where it has one per token.
        constants: the others, the same in every call, as `encoded` tells them.
        steps: of these, those of arguments that change from step to step, the latent apart.
    """

    latent: str
    timestep: str
    axes: dict[str, Axis]
    constants: dict[str, Any]
    steps: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"steps": list(self.steps)}

    @property
    def conditions(self) -> list[str]:
        """What belongs to the samples and stays the same from step to step."""
        return [name for name in self.axes if name != self.latent and name not in self.steps]

    def rows(self, flat: dict[str, Any]) -> int:
        """Samples in a call, those of every part of a doubled batch counted."""
        axis = self.axes[self.latent]
        return axis.of_samples(argument(flat, self.latent, axis))

    def samples(self, flat: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
        """The arguments of a run of samples, `[end - begin, ...]` each; those that a call leaves out are left out."""
        found = {name: (axis, argument(flat, name, axis)) for name, axis in self.axes.items()}
        return {name: axis.taken(value, begin, end) for name, (axis, value) in found.items() if value is not None}

    def timesteps(self, flat: dict[str, Any], n: int) -> Tensor:
        """The timestep of each of n samples `[n]`: a call has one, but for tokens that are held (the first frame of a video)."""
        value = torch.as_tensor(flat[self.timestep])
        return (value.float() if value.is_floating_point() else value).max().expand(n)


def argument(flat: dict[str, Any], name: str, axis: Axis) -> Any:
    """An argument's value; a list, where it was flattened, and None where the call leaves it out."""
    if not axis.listed:
        return flat.get(name)
    entries: list[Any] = []
    while f"{name}.[{len(entries)}]" in flat:
        entries.append(flat[f"{name}.[{len(entries)}]"])
    return entries or None


@dataclass
class Caller:
    """Puts the arguments of a denoiser call together from a batch of records.

    Args:
        arguments: how they are laid out.
        device: of the call.
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
        """The same as the denoiser takes them."""
        return unflatten(self.flat(latent, timestep, cond))


def stacked(entries: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Tensors of different lengths as one `[n, longest, ...]`, filled up with zeros, and their lengths `[n]`."""
    if len({entry.shape for entry in entries}) == 1:
        return torch.stack(entries), None
    return pad_sequence(entries, batch_first=True), torch.tensor([len(entry) for entry in entries])


def encoded(value: Any, rows: int) -> Any:
    """An argument that is the same in every call of so many rows, as JSON.

    A list with the same entry for each row is told by that entry, and so fits another batch.

    Raises:
        TypeError: it cannot be told in JSON.
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
    """The inverse of `encoded`, by the size of the batch."""
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
