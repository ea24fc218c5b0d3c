"""The facts of a teacher in `dataset.json`: its models, and how its pipeline guides."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from stages.base.arguments import Arguments

PLACE_OF_TEACHER = "pretrained_model_name_or_path"


@dataclass(frozen=True)
class LayoutFacts:
    """How one guided step of a pipeline is laid out.

    Attributes:
        arguments: of the denoiser's calls.
        calls: denoiser calls per step; call: index of the conditional one.
        chunks: parts of the batch in that call, each with one sample per trajectory; chunk: the conditional one.
        masks: the denoiser's arguments that mask another one, `NAME_mask` beside NAME; an absent mask masks nothing.
        denoisers: their names in the pipeline; of several, each runs for its own timesteps.
        timestep_scale, timestep_offset: the denoiser's timestep is the scheduler's times the scale plus the offset.
        target_channels: the number of channels of each prediction that the scheduler, or a copy of it, receives; a
            negative number counts from the last channel, and 0 is all.
        target_signs: -1 for a scheduler that receives minus the prediction.
        learned_variance: whether the denoiser predicts a variance beside these channels.
        no_guidance: the call's arguments that switch the pipeline's guidance off.
        scale_offset: `w` in `u + w (c - u)` minus the pipeline's own number for it.
        unconditional: call and chunk of the unconditional part, if there is exactly one.
        scale_per_sample: whether one call of the pipeline can hold samples of several scales.
        one_sample: whether a call of the pipeline holds one sample only.
    """

    arguments: Arguments
    calls: int
    call: int
    chunks: int
    chunk: int
    masks: tuple[str, ...]
    denoisers: tuple[str, ...]
    timestep_scale: float
    timestep_offset: float
    target_channels: tuple[int, ...]
    target_signs: tuple[int, ...]
    learned_variance: bool
    no_guidance: dict[str, Any]
    scale_offset: float = 0.0
    unconditional: tuple[int, int] | None = None
    scale_per_sample: bool = False
    one_sample: bool = False


@dataclass(frozen=True)
class DenoiserFacts:
    """One of the teacher's denoisers; `in_channels` is None where its configuration has none."""

    denoiser_class: str
    denoiser_fingerprint: str
    in_channels: int | None


@dataclass(frozen=True)
class TeacherFacts:
    """A teacher's identity and behaviour; equal on every worker of a run.

    Attributes:
        denoiser_subfolder: the first denoiser's name in the pipeline.
        denoisers: every denoiser of the layout, by its name in the pipeline.
        prediction_type: None where the scheduler's configuration names none.
        guidance_rule: the rule's name and settings.
        arguments: extra arguments of the pipeline's call.
        config: where the pipeline's configuration is, if its weights are one file.
    """

    pretrained_model_name_or_path: str
    revision: str | None
    variant: str | None
    pipeline_class: str
    denoiser_class: str
    denoiser_subfolder: str
    denoiser_fingerprint: str
    denoisers: dict[str, DenoiserFacts]
    torch_dtype: str
    scheduler_class: str
    scheduler_config: dict[str, Any]
    prediction_type: str | None
    guidance_rule: dict[str, Any]
    arguments: dict[str, Any]
    layout: LayoutFacts
    config: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The facts as they are read back from `dataset.json`: tuples and arrays become lists, unknown objects text."""
        return json.loads(
            json.dumps(asdict(self), default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
        )
