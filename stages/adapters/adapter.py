"""The contract of every variant: its sites, its conditions, and what it adds in a forward pass."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from stages.adapters import folder
from stages.adapters.conditioning import Conditioning, ScaleAlone, choose_conditions
from stages.adapters.config import NEGATIVE_TOKENS, TIMESTEP, AdapterConfig
from stages.adapters.export import export
from stages.adapters.fit import check_blocks, check_shapes
from stages.adapters.forward_pass import ForwardPass
from stages.adapters.fusing import LowRank
from stages.adapters.inputs import Inputs
from stages.adapters.layers import find_blocks
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.site import Site
from stages.adapters.sites import Shape, every_site, find_sites
from stages.adapters.spots import TrialFacts
from stages.adapters.trial_forward import run_trial
from stages.errors import UserError


class GuidanceAdapter(ForwardPass):
    """A small trained network with which one conditional pass of a frozen denoiser predicts the guided output.

    It runs in forward hooks: no module or attention processor is replaced, and state-dict keys do not change. Its
    output is initialised to zero, so an untrained adapter leaves the base's output bit for bit as it is. Adapter
    guidance distillation: arXiv 2503.07274.
    """

    default_sites: ClassVar[tuple[str, ...]] = ("attention",)
    default_conditions: ClassVar[tuple[str, ...]] = ("timestep", "pooled")
    default_rank: ClassVar[int] = 16
    default_learning_rate: ClassVar[float] = 2e-3
    variants: ClassVar[dict[str, type[GuidanceAdapter]]] = {}

    def __init_subclass__(cls) -> None:
        GuidanceAdapter.variants[cls.variant] = cls

    def __init__(self, config: AdapterConfig, shapes: dict[str, Shape], metadata: AdapterMetadata) -> None:
        super().__init__(config, shapes, metadata)
        self.conditioning = self.new_conditioning()
        self.sites = nn.ModuleDict({name.replace(".", "/"): self.new_site(*shape) for name, shape in shapes.items()})

    # The variant

    @abstractmethod
    def new_site(self, *shape: int) -> Site:
        """Create the module for a site of this shape."""

    def new_conditioning(self) -> Conditioning | ScaleAlone:
        """Create the embedding of what the variant sees."""
        wanted = list(self.config.conditions or [])
        metadata, chosen = self.metadata, choose_conditions(self.metadata.conditions, wanted)
        scale, offset, most = metadata.timestep_scale, metadata.timestep_offset, metadata.scale_range[1]
        return Conditioning(self.config.hidden_size, chosen, scale, TIMESTEP in wanted, offset, most)

    @property
    def sees_negative(self) -> bool:
        """Whether the adapter sees the tokens of the unconditional pass."""
        return NEGATIVE_TOKENS in (self.config.conditions or [])

    @property
    def rank(self) -> int:
        return self.config.rank or self.default_rank

    @classmethod
    def candidates(cls, denoiser: nn.Module) -> dict[str, Shape]:
        """Return every possible site of this variant in a denoiser, with its widths, for a trial forward."""
        return every_site(denoiser)

    @classmethod
    def find_sites(
        cls,
        denoiser: nn.Module,
        config: AdapterConfig,
        metadata: AdapterMetadata,
        seen: dict[str, TrialFacts] | None = None,
    ) -> dict[str, Shape]:
        """Return the sites of this variant in a denoiser.

        Args:
            seen: what a trial forward showed of the candidates; None without a trial.
        """
        return find_sites(denoiser, list(config.sites or []), seen)

    @classmethod
    def completed(cls, config: AdapterConfig) -> AdapterConfig:
        """Fill the configuration's open fields with this variant's defaults."""
        return replace(
            config,
            sites=list(cls.default_sites if config.sites is None else config.sites),
            conditions=list(cls.default_conditions if config.conditions is None else config.conditions),
            rank=cls.default_rank if config.rank is None else config.rank,
        )

    @classmethod
    def with_base_metadata(cls, metadata: AdapterMetadata, denoiser: nn.Module) -> AdapterMetadata:
        """Add to the metadata what this variant needs to know of the base."""
        return metadata

    def init_from_base(self, denoiser: nn.Module) -> None:
        """Initialise the adapter from the base's weights."""

    @staticmethod
    def get_class(variant: str) -> type[GuidanceAdapter]:
        """Return the class of a variant.

        Raises:
            UserError: no variant has that name.
        """
        if variant not in GuidanceAdapter.variants:
            raise UserError(f"adapter.variant={variant}: one of {', '.join(sorted(GuidanceAdapter.variants))}")
        return GuidanceAdapter.variants[variant]

    @staticmethod
    def for_denoiser(
        config: AdapterConfig, denoiser: nn.Module, metadata: AdapterMetadata, inputs: Inputs | None = None
    ) -> GuidanceAdapter:
        """Create an untrained adapter for the sites found in a denoiser.

        Args:
            inputs: arguments of one denoiser call, flat, for a trial forward (`trial_forward.run_trial`), which shows
                what module names do not. Their values do not matter, and they may be on the meta device.
        """
        kind = GuidanceAdapter.get_class(config.variant)
        config, metadata = kind.completed(config), kind.with_base_metadata(metadata, denoiser)
        candidates = kind.candidates(denoiser)
        seen = run_trial(denoiser, candidates, inputs, metadata) if inputs is not None and candidates else None
        shapes = kind.find_sites(denoiser, config, metadata, seen)
        spots = {} if seen is None else {name: spec for name in shapes if (spec := seen[name].spec())}
        adapter = kind(config, shapes, replace(metadata, blocks=find_blocks(denoiser, shapes), spots=spots))
        adapter.init_from_base(denoiser)
        return adapter

    # Its sites

    def check_fit(self, denoiser: nn.Module) -> None:
        """
        Raises:
            UserError: the base has other sites than the adapter.
        """
        check_shapes(denoiser, self.shapes, self.find_same_sites(denoiser))
        check_blocks(denoiser, self.shapes, self.metadata.blocks)

    def find_same_sites(self, denoiser: nn.Module) -> dict[str, Shape]:
        """Find this adapter's sites in another denoiser by name: only a trial shows which candidates are usable."""
        candidates = self.candidates(denoiser)
        return {name: candidates[name] for name in self.shapes if name in candidates}

    def lora_weights(self, guidance_scale: float) -> LowRank:
        raise UserError(f"adapter.variant={self.variant}: only `lora` is a change of weights")

    def why_unfused(self, denoiser: nn.Module) -> str | None:
        return f"the variant {self.variant} computes beside the base's layers; `lora` changes their weights"

    # The folder

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json`, `adapter_model.safetensors` and the model card."""
        folder.save(self, Path(save_directory))

    @staticmethod
    def from_pretrained(name_or_path: str | Path, **source: Any) -> GuidanceAdapter:
        """Load an adapter from a folder, on disk or in a bucket (`s3://bucket/prefix`), or by its hub id.

        Nothing in the folder can run code.

        Args:
            source: `revision`, `token` and other arguments of `huggingface_hub.snapshot_download`.

        Raises:
            UserError: it is not an adapter, or has another format version.
        """
        config, shapes, metadata, weights = folder.load(name_or_path, **source)
        with folder.loading_errors(name_or_path):
            adapter = GuidanceAdapter.get_class(config.variant)(config, shapes, metadata)
            adapter.load_state_dict(weights)
        return adapter.eval()

    def export_lora(self, save_directory: str | Path, guidance_scale: float, format: str = "diffusers") -> Path:
        """Write this adapter at one scale as a LoRA that other tools load without this project.

        Args:
            save_directory: a folder; for `kohya` a file that ends in `.safetensors`.
            guidance_scale: above 1; outside the trained range it warns.
            format: `diffusers`, for `pipe.load_lora_weights`; `peft`, for `PeftModel.from_pretrained` and servers;
                `kohya`, for ComfyUI and the trainers.

        Returns:
            The path of the weights.

        Raises:
            UserError: the adapter is not a `lora`, sees more than the scale, or no tool loads the format into its base.
        """
        return export(self, Path(save_directory), guidance_scale, format)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload guidance adapter",
    ) -> str:
        """Upload the adapter with its model card to a model hub; return the commit's address."""
        return folder.push(self, repo_id, private, token, commit_message)
