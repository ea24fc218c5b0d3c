"""One call of any pipeline: the same for a teacher that is recorded, and for images that are compared."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stages.base.pictures import PICTURES, open_picture
from stages.base.undecoded import Kept, decode, synchronize, undecoded, up_to_images
from stages.errors import UserError

__all__ = ["Condition", "Kept", "Request", "decode", "sample", "synchronize", "undecoded"]

Condition = dict[str, Any]  # of one image: `class_label`, or `prompt`, a picture, and perhaps `negative_prompt`
ONE_FOR_EACH = ("prompt", "negative_prompt", "generator", *PICTURES)
SCALE_KEYWORDS = ("true_cfg_scale", "guidance_scale")  # where a pipeline has both, the second feeds an embedding

# What a pipeline must be told before it guides by two passes, where its own defaults do not.
CALL_DEFAULTS: dict[str, dict[str, Any]] = {
    "QwenImagePipeline": {"negative_prompt": " "},
    "PixArtSigmaPipeline": {"use_resolution_binning": False, "clean_caption": False},
    "WanPipeline": {"num_frames": 1},
}


@dataclass(frozen=True)
class Request:
    """What is asked of a pipeline: a condition and a seed per image, and what else its `__call__` takes."""

    conditions: Sequence[Condition]
    seeds: Sequence[int]
    num_inference_steps: int
    arguments: dict[str, Any]


def guider_of(pipe: Any) -> Any:
    """The guider of a modular pipeline, or None where the pipeline guides by itself."""
    return getattr(pipe, "guider", None)


def scale_keyword(pipe: Any) -> str:
    """The argument of `pipe.__call__` by which guidance with two passes is told its scale.

    Raises:
        UserError: it has none.
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
    """Run a pipeline once; what it samples is kept by whoever watches (`undecoded`, a recorder)."""
    general = CALL_DEFAULTS.get(type(pipe).__name__, {}) | request.arguments
    arguments: dict[str, Any] = {
        **general,
        **_named_arguments(pipe, request.conditions, general.get("negative_prompt")),
        "generator": [torch.Generator().manual_seed(seed) for seed in request.seeds],
        "num_inference_steps": request.num_inference_steps,
        "output_type": "pt",
    }
    if len(request.seeds) == 1:  # which is all that some pipelines take
        arguments |= {name: arguments[name][0] for name in ONE_FOR_EACH if name in arguments}
    guider = guider_of(pipe)
    with up_to_images(pipe, len(request.seeds)), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(request.seeds[0])  # some draw what no generator of theirs gives, to encode a picture
        if guider is None:
            pipe(**arguments, **{scale_keyword(pipe): guidance_scale})
            return
        before, guider.guidance_scale = guider.guidance_scale, guidance_scale
        try:
            pipe(**arguments)
        finally:
            guider.guidance_scale = before


def _named_arguments(pipe: Any, conditions: Sequence[Condition], negative_prompt: str | None) -> dict[str, Any]:
    """The conditions as the pipeline's `__call__` takes them; `negative_prompt` is of those that have none of their own."""
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


def takes_class_labels(pipeline_class: type) -> bool:
    """Whether a pipeline is conditioned by classes, and not by prompts."""
    return "class_labels" in inspect.signature(pipeline_class.__call__).parameters
