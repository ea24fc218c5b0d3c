"""An adapter's metadata: its base, teacher and training, as JSON in its folder and as dataclasses in memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from stages.adapters.sites import Shape
from stages.storage.fields import read_fields


@dataclass(frozen=True, kw_only=True)
class Base:
    """The denoiser that an adapter was made for, and where to load it from."""

    pretrained_model_name_or_path: str = ""
    revision: str | None = None
    variant: str | None = None
    pipeline_class: str | None = None
    config: str | None = None
    denoiser_class: str = ""
    denoiser_subfolder: str = ""
    denoiser_fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class RecordedTeacher:
    """The set-up of the recorded pipeline."""

    scheduler_class: str | None = None
    scheduler_config: dict[str, Any] | None = None
    guider: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """What an adapter's folder holds besides configuration, sites and weights.

    Attributes:
        conditions: of the records, as `find_conditions` returns them; sampled: the recorded classes and number of
            prompts.
        arguments: further arguments of the teacher's call; guidance_rule: the teacher's rule with its settings.
        scale_range: lowest and highest trained scale.
        timestep: the name of the denoiser's timestep, `timestep_scale * t + timestep_offset` of the scheduler's t.
        axes: where each argument of the denoiser has its samples; without it, shapes decide.
        no_guidance: arguments that switch the pipeline's own guidance off.
        scale_offset: added to the pipeline's scale for the scale w of `u + w (c - u)`.
        unconditional: call, chunk and number of chunks of the unconditional pass; None if unknown.
        blocks: the number of blocks in each list with sites; spots: for each site, what differs from `Spot()`.
        weights: shapes of the trained weights, for the variant `full`.
        guidance_gain: factor on the requested guidance, `w - 1`.
        training: counts of the dataset and of what was trained on and held out, sizes, steps and losses.
        evaluation: rows of the last evaluation.
        dial: by exported scale, the effective scale of each strength.
    """

    conditions: dict[str, dict[str, Any]]
    sampled: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    scale_range: list[float]
    guidance_rule: dict[str, Any] = field(default_factory=dict)
    prediction_type: str | None = None
    timestep: str = "timestep"
    axes: dict[str, dict[str, Any]] = field(default_factory=dict)
    timestep_scale: float = 1.0
    timestep_offset: float = 0.0
    no_guidance: dict[str, Any] = field(default_factory=dict)
    scale_offset: float = 0.0
    unconditional: dict[str, int] | None = None
    base: Base = Base()
    teacher: RecordedTeacher = RecordedTeacher()
    dataset_fingerprint: str = ""
    blocks: dict[str, int] = field(default_factory=dict)
    guidance_gain: float = 1.0
    # Only in some folders
    weights: dict[str, Shape] = field(default_factory=dict)
    spots: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    dial: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value or name not in OPTIONAL}

    @staticmethod
    def from_json(values: dict[str, Any]) -> AdapterMetadata:
        """
        Raises:
            ValueError: a key is missing, unknown, or of another type.
        """
        check_keys(AdapterMetadata, values)
        for name, kind in (("base", Base), ("teacher", RecordedTeacher)):
            check_keys(kind, values[name] or {}, f"{name}.")
        metadata = read_fields(AdapterMetadata, values)
        if len(metadata.scale_range) != 2:
            raise ValueError(f"scale_range={metadata.scale_range} is not a lowest and a highest scale")
        return metadata


OPTIONAL = ("weights", "spots", "training", "evaluation", "dial", "config")


def check_keys(kind: type[Any], values: dict[str, Any], prefix: str = "") -> None:
    """Refuse unknown keys and missing ones; keys with a default are missing, too, unless they are optional.

    Raises:
        ValueError: names the key.
    """
    known = {entry.name for entry in fields(kind)}
    for name in sorted(values.keys() - known):
        raise ValueError(f"{prefix}{name} is not known")
    for name in sorted(known - values.keys() - set(OPTIONAL)):
        raise ValueError(f"{prefix}{name} is missing")
