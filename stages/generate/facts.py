"""Facts about a teacher, as a worker reports them and `dataset.json` stores them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.generate.layout import Layout  # imports torch, which a driver's fleet does not need


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
    layout: Layout

    def to_json(self) -> dict[str, Any]:
        """The facts as they are read back from `dataset.json`: tuples and arrays become lists, unknown objects text."""
        facts = asdict(self) | {"layout": self.layout.facts()}
        return json.loads(
            json.dumps(facts, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
        )
