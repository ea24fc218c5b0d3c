"""The parts of an evaluation: small files, written atomically, from which an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stages.errors import UserError
from stages.storage.files import whole_file

SHOWN = "shown"
LAYOUT = 4  # increases with every change of the parts' content


@dataclass(frozen=True)
class Result:
    """The result of one setting in one part.

    Attributes:
        values: measurements by name, with an entry per image `[n, ...]`.
        shown: images for the report, bytes `[k, c, h, w]`.
        fused: for `one_pass`, whether only the base's modules ran; None for other methods.
    """

    values: dict[str, Tensor]
    shown: Tensor
    denoiser_evaluations: int
    seconds: float
    fused: bool | None


class Parts:
    """Files such as `OUTPUT/parts/00003.safetensors`, each with the results of every setting on one batch of seeds.

    Args:
        output: folder of the evaluation.
        identity: hash of everything that the parts depend on.
        count: number of parts.
    """

    def __init__(self, output: Path, identity: str, count: int) -> None:
        self.output, self.folder = output, output / "parts"
        self.identity, self.count = identity, count

    def path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.safetensors"

    def missing(self) -> list[int]:
        """The parts that are not made yet.

        Raises:
            UserError: the folder holds parts of another evaluation.
        """
        found = {path: self._metadata(path).get("identity") for path in self.folder.glob("*.safetensors")}
        if set(found.values()) - {None, self.identity}:
            raise UserError(
                f"{self.output}: holds another evaluation, or one with other options: take another output_dir, or "
                "remove it"
            )
        return [part for part in range(self.count) if found.get(self.path(part)) != self.identity]

    def write(self, part: int, timesteps: Sequence[float], results: Sequence[Result]) -> None:
        tensors: dict[str, Tensor] = {}
        for i, result in enumerate(results):
            tensors |= {
                f"{i}.{name}": value.contiguous() for name, value in {**result.values, SHOWN: result.shown}.items()
            }
        metadata = {
            "identity": self.identity,
            "timesteps": json.dumps(list(timesteps)),
            "denoiser_evaluations": json.dumps([result.denoiser_evaluations for result in results]),
            "seconds": json.dumps([result.seconds for result in results]),
            "fused": json.dumps([result.fused for result in results]),
        }
        with whole_file(self.path(part)) as file:
            file.write(safetensors.torch.save(tensors, metadata))

    def timesteps(self) -> list[float]:
        """The timesteps of the scheduler's steps, equal in every part."""
        return json.loads(self._metadata(self.path(0))["timesteps"])

    def result(self, setting: int) -> Result:
        """The result of a setting over all parts."""
        values: dict[str, list[Tensor]] = {}
        evaluations, seconds, fused = 0, 0.0, []
        for part in range(self.count):
            with safetensors.safe_open(self.path(part), "pt") as file:
                metadata = file.metadata()
                for name in file.keys():  # noqa: SIM118  not a dictionary
                    number, _, value = name.partition(".")
                    if int(number) == setting:
                        values.setdefault(value, []).append(file.get_tensor(name))
            evaluations += json.loads(metadata["denoiser_evaluations"])[setting]
            seconds += json.loads(metadata["seconds"])[setting]
            fused.append(json.loads(metadata["fused"])[setting])
        joined = {name: torch.cat(found) for name, found in values.items()}
        shown = joined.pop(SHOWN)
        return Result(joined, shown, evaluations, seconds, None if None in fused else all(fused))

    def values(self, setting: int, name: str) -> Tensor:
        """One measurement of a setting, over the images of all parts `[n, ...]`."""
        found = []
        for part in range(self.count):
            with safetensors.safe_open(self.path(part), "pt") as file:
                found.append(file.get_tensor(f"{setting}.{name}"))
        return torch.cat(found)

    @staticmethod
    def _metadata(path: Path) -> dict[str, Any]:
        """A file's metadata; empty if the file cannot be read, so that the part is made again."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                return file.metadata() or {}
        except (OSError, safetensors.SafetensorError):
            return {}
