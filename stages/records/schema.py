"""The content of commit records and of `dataset.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from stages.base.size import size_name
from stages.records.teacher import TeacherFacts
from stages.storage.fields import read_fields

SCHEMA_VERSION = 3
# These keys of the newest snapshot's plan are repeated at the top of `dataset.json`.
SNAPSHOT_KEYS = ("config", "conditions", "guidance", "counts", "manifest_sha256")


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of one record's tensor."""

    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class SizeFacts:
    """What the records of one size have in common.

    Attributes:
        tensors: dtype and shape of one record's tensors by name.
        constants, decoder_input: see `Commit`.
    """

    tensors: dict[str, TensorSpec]
    constants: dict[str, Any] = field(default_factory=dict)
    decoder_input: list[int] | None = None


@dataclass(frozen=True)
class Commit:
    """A unit's commit record.

    Attributes:
        plan: digest of the unit's plan, from `plan_digests`.
        shard: name of the file below the dataset's root.
        size: of the shard, in bytes.
        sha256: of the shard, in hexadecimal.
        tensors: by name.
        samples: the rows of the manifest, without the columns of the shard.
        constants: the denoiser's constant arguments that depend on the size, as `Arguments.constants`.
        decoder_input: the shape of what the VAE receives of one sample, if `to_decoder_input` makes it from the
            scheduler's last latents; None if not.
    """

    unit: int
    plan: str
    shard: str
    size: int
    sha256: str
    tensors: dict[str, TensorSpec]
    samples: list[dict[str, Any]]
    constants: dict[str, Any] = field(default_factory=dict)
    decoder_input: list[int] | None = None

    @property
    def size_name(self) -> str:
        """The name of the size that all its samples have."""
        return size_name(self.samples[0])


@dataclass(frozen=True)
class GuidanceSpec:
    """The rule by which the teacher guides, and the lowest and the highest scale of a plan."""

    rule: dict[str, Any]
    scale_range: list[float]


@dataclass(frozen=True)
class ConditionsSpec:
    """The conditions of a plan, including those of the plans before it.

    Attributes:
        class_labels: each label once, in order.
        prompts, negative_prompts: the number of different ones.
        count: length of the list of conditions.
        sha256: of the list as JSON.
    """

    class_labels: list[int]
    prompts: int
    negative_prompts: int
    count: int
    sha256: str


@dataclass(frozen=True)
class Counts:
    """The size of a snapshot."""

    trajectories: int
    samples: int
    records: int
    units: int
    bytes: int


@dataclass(frozen=True)
class PlanEntry:
    """An entry of `plans`: what one run of generation adds to the dataset.

    Attributes:
        units, trajectories: of this plan alone.
        config: the part of the configuration that decides what the dataset holds.
        evaluations: of the teacher's denoiser for one trajectory; None where nobody has counted them.
    """

    units: int
    trajectories: int
    guidance: GuidanceSpec
    conditions: ConditionsSpec
    config: dict[str, Any]
    evaluations: int | None = field(default=None, kw_only=True)

    @staticmethod
    def from_json(value: Any, name: str) -> PlanEntry:
        """
        Raises:
            FieldError: a key is missing, or holds another type.
        """
        published = isinstance(value, dict) and "manifest_sha256" in value
        return read_fields(PublishedPlan if published else PlanEntry, value, name)


@dataclass(frozen=True)
class PublishedPlan(PlanEntry):
    """A published plan: its units and those of all plans before it are a snapshot.

    Attributes:
        counts: of the snapshot.
        manifest_sha256: of the snapshot's manifest file.
        fingerprint: of what the snapshot's samples hold; identifies the snapshot.
    """

    counts: Counts
    manifest_sha256: str
    fingerprint: str


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`.

    Attributes:
        complete: whether every published unit is there; False while some are made again.
        plans: oldest first; the last may be under way.
        sizes: what differs from size to size, by the size's name, as `size_name` gives it; none before the first
            snapshot.
    """

    complete: bool
    teacher: TeacherFacts
    plans: tuple[PlanEntry, ...] = ()
    sizes: dict[str, SizeFacts] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype and shape of one record's tensors by name, of the first size; none before the first snapshot."""
        return next((size.tensors for size in self.sizes.values()), {})

    def tensors_of(self, row: dict[str, Any]) -> dict[str, TensorSpec]:
        """Dtype and shape of one record's tensors by name, of the size of a row of the manifest."""
        return self.sizes[size_name(row)].tensors

    @property
    def published(self) -> tuple[PublishedPlan, ...]:
        """The published plans, oldest first. While the dataset is not `complete`, units of theirs are made again."""
        return tuple(plan for plan in self.plans if isinstance(plan, PublishedPlan))

    def to_json(self) -> dict[str, Any]:
        newest = asdict((self.published or self.plans)[-1])
        top = {key: newest[key] for key in SNAPSHOT_KEYS if key in newest}
        return {"schema_version": SCHEMA_VERSION} | asdict(self) | top
