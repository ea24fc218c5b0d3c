"""Preference scores of images and prompts, by code of the user's: `preference=[MODULE:NAME]`."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from stages.base.denoiser import fingerprint
from stages.base.loading import first_line
from stages.base.pictures import to_picture
from stages.base.sampling import Condition
from stages.errors import UserError

PREFERENCE = "preference."  # prefix of the scores' names in a row
Score = Callable[[list[Image.Image], list[str]], Any]


class PreferenceJudge:
    """Measures images and their prompts by a score; its name becomes a column.

    Args:
        entry: `MODULE:NAME`. `NAME(device)` returns the score: a callable of n pictures in RGB and their n prompts that
            returns n numbers, as a list or a tensor.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, entry: str, device: str) -> None:
        self.entry = entry
        module, _, name = entry.partition(":")
        if not module or not name.isidentifier():
            raise UserError(f"preference={entry}: name a class or function as MODULE:NAME")
        try:
            self.score: Score = getattr(importlib.import_module(module), name)(device)
        except Exception as error:  # the user's code may raise anything
            raise UserError(
                f"preference={entry}: cannot be loaded: {named(error)}: fix that, or leave it out"
            ) from error
        if not callable(self.score):
            raise UserError(f"preference={entry}: {name}(device) returns no callable of pictures and prompts: fix that")
        self.name, self.source = PREFERENCE + name, getattr(sys.modules[module], "__file__", None)

    @property
    def fingerprint(self) -> str:
        """A hash of the score's module, not of what that imports, and of its weights if it is a module of torch."""
        code = Path(self.source).read_bytes() if self.source else b""
        weights = fingerprint(self.score) if isinstance(self.score, nn.Module) else ""
        return hashlib.sha256(self.entry.encode() + code + weights.encode()).hexdigest()

    @torch.no_grad()
    def measure(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """The scores `[n]` of images `[n, c, h, w]` in [-1, 1]."""
        pictures = [to_picture(image).convert("RGB") for image in images]
        try:
            found = self.score(pictures, [condition["prompt"] for condition in conditions])
            scores = torch.as_tensor(found, dtype=torch.float32).detach().cpu()
        except Exception as error:
            raise UserError(f"preference={self.entry}: fails: {named(error)}: fix that, or leave it out") from error
        if scores.shape != (len(images),):
            raise UserError(
                f"preference={self.entry}: returns numbers of shape {list(scores.shape)} for {len(images)} images: "
                "return one number an image"
            )
        if not scores.isfinite().all():
            raise UserError(f"preference={self.entry}: returns a number that is not finite: fix that, or leave it out")
        return {self.name: scores}


def named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def load_scores(entries: Sequence[str], device: str) -> list[PreferenceJudge]:
    """
    Raises:
        UserError: one cannot be loaded, or two have one name.
    """
    judges = [PreferenceJudge(entry, device) for entry in entries]
    names = [judge.name.removeprefix(PREFERENCE) for judge in judges]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"preference: {twice[0]} is given twice: give each score a name of its own")
    return judges
