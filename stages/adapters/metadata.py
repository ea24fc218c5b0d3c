"""What an adapter's folder tells besides the variant and the sites: its base, its teacher, its training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from stages.adapters.sites import Shape

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The denoiser that an adapter was made for, and where it is found."""

    pretrained_model_name_or_path: str = ""
    revision: str | None = None
    variant: str | None = None
    pipeline_class: str | None = None
    denoiser_class: str = ""
    denoiser_subfolder: str = ""
    denoiser_fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class RecordedTeacher:
    """How the pipeline was set up whose guidance was recorded."""

    scheduler_class: str | None = None
    scheduler_config: dict[str, Any] | None = None
    guider: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """What an adapter's folder tells besides the variant and the sites.

    Attributes:
        conditions: of the records, as `find_conditions` returns them; sampled: the classes, and how many prompts.
        arguments: what the teacher's call was given besides; guidance_rule: how the teacher guided.
        scale_range: lowest and highest trained scale.
        timestep: the name of the denoiser's timestep, which is `timestep_scale * t + timestep_offset` of the scheduler's t.
        axes: by argument of the denoiser, where its samples are; found by shape where there is none.
        no_guidance: arguments that switch the pipeline's own guidance off.
        scale_offset: added to the pipeline's scale for the scale w of `u + w (c - u)`.
        unconditional: call, chunk and number of chunks of the unconditional pass; None where there is none.
        blocks: of each list of blocks with sites, how many it had; spots: of a site, what differs from `Spot()`.
        weights: of the variant `full`, the shape of each.
        guidance_gain: how many times the guidance is asked of the variant.
        training: what it was trained on, and its losses; evaluation: rows of the last one.
        dial: by exported scale, the scale that each strength shows.
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
            ValueError: a key is missing, not known, or of another type.
        """
        base, teacher = read(Base, values["base"], "base."), read(RecordedTeacher, values["teacher"], "teacher.")
        return read(AdapterMetadata, values | {"base": base, "teacher": teacher})


OPTIONAL = ("weights", "spots", "training", "evaluation", "dial")


def read(kind: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """A dataclass from JSON.

    Raises:
        ValueError: a key is missing, not known, or of another type.
    """
    hints = get_type_hints(kind)
    for name in values.keys() - hints.keys():
        raise ValueError(f"{prefix}{name} is not known")
    for entry in fields(kind):  # type: ignore[arg-type]
        if entry.name not in values and entry.name not in OPTIONAL:
            raise ValueError(f"{prefix}{entry.name} is missing")
        if entry.name in values and not is_of(values[entry.name], hints[entry.name]):
            raise ValueError(f"{prefix}{entry.name}={values[entry.name]} is no {entry.type}")
    return kind(**values)


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, or an alternative of types; what is within a container is not looked at."""
    if isinstance(hint, UnionType):
        return any(is_of(value, each) for each in get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)
