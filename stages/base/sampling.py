"""One call of any pipeline, for recording a teacher and for comparing images."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stages.base.patching import replaced
from stages.base.pictures import PICTURES, open_picture
from stages.base.size import Size
from stages.base.undecoded import (
    Kept,
    decode,
    decoder_input_of,
    shape_of_images,
    synchronize,
    undecoded,
    up_to_images,
)
from stages.errors import UserError

__all__ = [
    "Condition",
    "Kept",
    "Request",
    "decode",
    "decoder_input_of",
    "noise_seeds",
    "sample",
    "shape_of_images",
    "synchronize",
    "undecoded",
]

Condition = dict[str, Any]  # of one image: `class_label`, or `prompt`, pictures and `negative_prompt`; its size
ONE_FOR_EACH = ("prompt", "negative_prompt", "generator", *PICTURES)
SCALE_KEYWORDS = ("true_cfg_scale", "guidance_scale")  # in a pipeline with both, the second feeds an embedding

# Arguments without which a pipeline does not guide by two passes.
CALL_DEFAULTS: dict[str, dict[str, Any]] = {
    "QwenImagePipeline": {"negative_prompt": " "},
    "PixArtSigmaPipeline": {"use_resolution_binning": False, "clean_caption": False},
    "WanPipeline": {"num_frames": 1},
}


SPREAD = 2_654_435_761  # odd, so that no two seeds below 2^32 give an image the same noise


def noise_seeds(seed: int, indices: Iterable[int]) -> list[int]:
    """The seed of each image's noise; torch's generator takes the lower 32 bits of a seed alone."""
    return [(seed * SPREAD + i) % 2**32 for i in indices]


@dataclass(frozen=True)
class Request:
    """The arguments of a pipeline's call: a condition and a seed per image, and extra arguments of its `__call__`.

    The conditions name one size, or none.
    """

    conditions: Sequence[Condition]
    seeds: Sequence[int]
    num_inference_steps: int
    arguments: dict[str, Any]


def guider_of(pipe: Any) -> Any:
    """The guider of a modular pipeline; None where the pipeline guides by itself."""
    return getattr(pipe, "guider", None)


def no_guidance_of(guider: Any) -> float:
    """The scale at which a guider does not guide: 0 under the rule `c + w (c - u)`, else 1."""
    return 0.0 if getattr(guider, "use_original_formulation", False) else 1.0


def scale_keyword(pipe: Any) -> str:
    """The argument of `pipe.__call__` that sets the scale of two-pass guidance.

    Raises:
        UserError: the call has none.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in SCALE_KEYWORDS:
        if name in parameters:
            return name
    raise UserError(
        f"{type(pipe).__name__} cannot be guided: its call takes none of {', '.join(SCALE_KEYWORDS)}: take another class of the "
        "model (teacher.pipeline_class=...), or a guider (teacher.guider.name=...)"
    )


def sample(pipe: Any, request: Request, guidance_scale: float) -> None:
    """Run a pipeline once; `undecoded` or a recorder keeps the result."""
    general = CALL_DEFAULTS.get(type(pipe).__name__, {}) | request.arguments
    arguments: dict[str, Any] = {
        **general,
        **_size_arguments(request.conditions[0]),
        **_named_arguments(pipe, request.conditions, general.get("negative_prompt")),
        "generator": [torch.Generator().manual_seed(seed) for seed in request.seeds],
        "num_inference_steps": request.num_inference_steps,
        "output_type": "pt",
    }
    if len(request.seeds) == 1:  # some pipelines take no list
        arguments |= {name: arguments[name][0] for name in ONE_FOR_EACH if name in arguments}
    guider = guider_of(pipe)
    with up_to_images(pipe, len(request.seeds)), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(request.seeds[0])  # some pipelines encode pictures with torch's own generator
        if guider is None:
            pipe(**arguments, **{scale_keyword(pipe): guidance_scale})
            return
        with _guided_by(pipe, guider, guidance_scale):
            pipe(**arguments)


@contextmanager
def _guided_by(pipe: Any, guider: Any, guidance_scale: float) -> Iterator[None]:
    """Within the context, a pipeline's guider has a scale; at the scale of no guidance it does nothing at all.

    Some guiders have further terms, which their scale does not switch off.
    """
    acting = copy.copy(guider)
    acting.guidance_scale = guidance_scale
    if guidance_scale == no_guidance_of(guider):
        acting.disable()
    with replaced(pipe, "guider", acting):
        yield


def _named_arguments(pipe: Any, conditions: Sequence[Condition], negative_prompt: str | None) -> dict[str, Any]:
    """The conditions as the pipeline's `__call__` takes them; `negative_prompt` fills in for conditions without one."""
    if takes_class_labels(type(pipe)):
        return {"class_labels": [condition["class_label"] for condition in conditions]}
    named: dict[str, Any] = {}
    if any("prompt" in condition for condition in conditions):
        named["prompt"] = [condition["prompt"] for condition in conditions]
        if negative_prompt is not None or any("negative_prompt" in condition for condition in conditions):
            named["negative_prompt"] = [c.get("negative_prompt", negative_prompt or "") for c in conditions]
    for name in PICTURES:
        if any(name in condition for condition in conditions):
            named[name] = [open_picture(name, condition[name]) for condition in conditions]
    return named


def _size_arguments(condition: Condition) -> dict[str, int]:
    """The size that a condition names, which all conditions of a call share, as the pipeline's `__call__` takes it."""
    size = Size.from_columns(condition)
    return {} if size is None else size.columns


def takes_class_labels(pipeline_class: type) -> bool:
    """Whether a pipeline is conditioned on classes instead of prompts."""
    return "class_labels" in inspect.signature(pipeline_class.__call__).parameters
