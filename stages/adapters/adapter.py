"""The contract of every variant: where it sits, what it sees, and what it adds in a forward pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.adapters import folder
from stages.adapters.attaching import Attachable
from stages.adapters.conditioning import Conditioning, ScaleAlone, choose_conditions
from stages.adapters.config import NEGATIVE_TOKENS, TIMESTEP, AdapterConfig
from stages.adapters.export import export
from stages.adapters.fit import check_blocks, check_shapes
from stages.adapters.fusing import LowRank
from stages.adapters.guidance import Prepared
from stages.adapters.inputs import Inputs, samples_of
from stages.adapters.layers import find_blocks
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.site import Site, add_to_output, apply_gate, expand_to_rows
from stages.adapters.sites import Shape, every_site, find_sites, layer_beneath
from stages.adapters.spots import Spot, TrialFacts, argument_in
from stages.adapters.trial_forward import run_trial
from stages.base.denoiser import flatten
from stages.errors import UserError


class GuidanceAdapter(Attachable):
    """A small trained part that makes one conditional pass of a frozen denoiser predict the guided output.

    It rides on forward hooks: no module and no attention processor is replaced, state-dict keys stay as they are. Its
    output is zero at the start, so that attached and untrained it changes nothing, bit for bit. Adapter guidance
    distillation: arXiv 2503.07274.
    """

    default_sites: ClassVar[tuple[str, ...]] = ("attention",)
    default_conditions: ClassVar[tuple[str, ...]] = ("timestep", "pooled")
    default_rank: ClassVar[int] = 16
    variants: ClassVar[dict[str, type[GuidanceAdapter]]] = {}

    def __init_subclass__(cls) -> None:
        GuidanceAdapter.variants[cls.variant] = cls

    def __init__(self, config: AdapterConfig, shapes: dict[str, Shape], metadata: AdapterMetadata) -> None:
        super().__init__(config, shapes, metadata)
        self.conditioning = self.new_conditioning()
        self.sites = nn.ModuleDict({name.replace(".", "/"): self.new_site(*shape) for name, shape in shapes.items()})

    # What a variant is

    @abstractmethod
    def new_site(self, *shape: int) -> Site:
        """The part of this variant for a site of this shape."""

    def new_conditioning(self) -> Conditioning | ScaleAlone:
        """What it sees."""
        wanted = list(self.config.conditions or [])
        chosen, scale = choose_conditions(self.metadata.conditions, wanted), self.metadata.timestep_scale
        return Conditioning(self.config.hidden_size, chosen, scale, TIMESTEP in wanted, self.metadata.timestep_offset)

    @property
    def sees_negative(self) -> bool:
        """Whether it knows the tokens of the unconditional pass."""
        return NEGATIVE_TOKENS in (self.config.conditions or [])

    @property
    def rank(self) -> int:
        return self.config.rank or self.default_rank

    @classmethod
    def candidates(cls, denoiser: nn.Module) -> dict[str, Shape]:
        """Every module of a denoiser that can be a site of this variant, with its widths: what a trial forward looks at."""
        return every_site(denoiser)

    @classmethod
    def find_sites(
        cls,
        denoiser: nn.Module,
        config: AdapterConfig,
        metadata: AdapterMetadata,
        seen: dict[str, TrialFacts] | None = None,
    ) -> dict[str, Shape]:
        """The sites of this variant in a denoiser; `seen` of its candidates in a trial forward, if there was one."""
        return find_sites(denoiser, list(config.sites or []), seen)

    @classmethod
    def completed(cls, config: AdapterConfig) -> AdapterConfig:
        """The configuration with this variant's defaults for what it leaves open."""
        return replace(
            config,
            sites=list(cls.default_sites if config.sites is None else config.sites),
            conditions=list(cls.default_conditions if config.conditions is None else config.conditions),
            rank=cls.default_rank if config.rank is None else config.rank,
        )

    @classmethod
    def with_base_metadata(cls, metadata: AdapterMetadata, denoiser: nn.Module) -> AdapterMetadata:
        """What the folder tells besides, with what of the base this variant needs to know."""
        return metadata

    def init_from_base(self, denoiser: nn.Module) -> None:
        """Take from the base what an untrained adapter begins with."""

    @staticmethod
    def get_class(variant: str) -> type[GuidanceAdapter]:
        """The class of a variant.

        Raises:
            UserError: there is none of that name.
        """
        if variant not in GuidanceAdapter.variants:
            raise UserError(f"adapter.variant={variant}: one of {', '.join(sorted(GuidanceAdapter.variants))}")
        return GuidanceAdapter.variants[variant]

    @staticmethod
    def for_denoiser(
        config: AdapterConfig, denoiser: nn.Module, metadata: AdapterMetadata, inputs: Inputs | None = None
    ) -> GuidanceAdapter:
        """A new adapter, untrained, for the sites that are found in a denoiser.

        Args:
            inputs: arguments of one call of the denoiser, flat, for a trial forward (`trial_forward.run_trial`) that shows what no name
                tells. Their values do not matter, and they may be on the meta device.
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

    # Where it sits

    def check_fit(self, denoiser: nn.Module) -> None:
        """
        Raises:
            UserError: the base has other sites.
        """
        check_shapes(denoiser, self.shapes, self.find_same_sites(denoiser))
        check_blocks(denoiser, self.shapes, self.metadata.blocks)

    def find_same_sites(self, denoiser: nn.Module) -> dict[str, Shape]:
        """The sites of this adapter in another denoiser: by name, because only a run shows which of the candidates are fit."""
        candidates = self.candidates(denoiser)
        return {name: candidates[name] for name in self.shapes if name in candidates}

    def lora_weights(self, guidance_scale: float) -> LowRank:
        raise UserError(f"adapter.variant={self.variant}: no change of weights: only `lora` is")

    def why_unfused(self, denoiser: nn.Module) -> str | None:
        return f"the variant {self.variant} computes beside the base's layers; `lora` changes their weights"

    def site_hooks(self, denoiser: nn.Module) -> Iterator[RemovableHandle]:
        """Have each site add its part to its module's output."""
        for i, name in enumerate(self.shapes):
            module = layer_beneath(denoiser.get_submodule(name))
            yield module.register_forward_hook(self._add(i, name, module), with_kwargs=True)

    def _add(self, i: int, name: str, module: nn.Module) -> Callable[..., Any]:
        site, shape = self._each_site()[i], self.shapes[name]
        spot, tokens_in = Spot(**self.metadata.spots.get(name, {})), argument_in(module)

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.prepared is None:
                return None
            tokens = tokens_in(spot.argument, args, kwargs)
            tokens = tokens.transpose(0, 1) if spot.across else tokens
            prepared = tuple(expand_to_rows(each, len(tokens), spot.tiled) for each in self.prepared[i])
            change = apply_gate(site.change(shape, tokens.to(self.dtype), prepared), self.gate, spot.tiled)
            return add_to_output(output, change.transpose(0, 1) if spot.across else change, spot.output)

        return add

    @property
    def dtype(self) -> torch.dtype:
        """In which the sites compute."""
        return next((parameter.dtype for parameter in self.sites.parameters()), torch.float32)

    # A forward pass

    def before_forward(self, denoiser: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
        """Compute once per forward what does not depend on the image; the arguments to go on with, if they change."""
        self.prepared = self.gate = None
        guidance = self.guidance
        if guidance is None or guidance.bypass:
            return None
        wanted = bool(self.config.conditions)
        samples = samples_of(flatten(given), next(iter(given)), self.metadata, wanted)
        if samples.ragged and guidance.is_readable and not guidance.is_uniform:
            raise UserError(
                "guidance_scale: one for each image, and the images' prompts differ in length: give the images one by one"
            )
        self.move_to(samples.device)
        guidance.to(samples.device)
        scale = guidance.at(guidance.row(samples.timestep), samples.count)
        self.gate = scale != 1 if guidance.mixed else None
        self.prepared = self._prepare(scale, samples.timestep, samples.conditions | guidance.negative)
        return None

    def after_forward(self, denoiser: nn.Module, output: Any) -> Any:
        """Keep nothing, but in training: blocks that are checkpointed run again in the backward pass."""
        if not torch.is_grad_enabled():
            self.prepared = self.gate = None
        return None

    def _prepare(self, scale: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Prepared:
        conditions = self.conditioning(self.scale_with_gain(scale), timestep, self.conditioning.embed(inputs)).to(
            self.dtype
        )
        return [(*site.prepare_step(conditions), *site.prepare_tokens(conditions)) for site in self._each_site()]

    def scale_with_gain(self, scale: Tensor) -> Tensor:
        """The scales that the variant is given for those wanted: more by the guidance gain, which leads none out of the training."""
        gain, most = self.metadata.guidance_gain, self.metadata.scale_range[1]
        return torch.minimum(scale + (gain - 1) * (scale - 1), scale.clamp(min=most))

    def _each_site(self) -> list[Site]:
        return [site for site in self.sites.values() if isinstance(site, Site)]

    # The folder

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json`, `adapter_model.safetensors` and the model card."""
        folder.save(self, Path(save_directory))

    @staticmethod
    def from_pretrained(name_or_path: str | Path, **source: Any) -> GuidanceAdapter:
        """The adapter of a folder, on disk or in a bucket (`s3://bucket/prefix`), or of a hub id; nothing in it can run code.

        Args:
            source: `revision`, `token` and what else `huggingface_hub.snapshot_download` takes.

        Raises:
            UserError: it is not an adapter, or of another version.
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
            guidance_scale: above 1; the trained range is where it was learnt.
            format: `diffusers`, for `pipe.load_lora_weights`; `peft`, for `PeftModel.from_pretrained` and servers; `kohya`, for
                ComfyUI and the trainers.

        Returns:
            The file with the weights.

        Raises:
            UserError: the adapter is no `lora`, sees more than the scale, or nothing loads the format into its base.
        """
        return export(self, Path(save_directory), guidance_scale, format)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload guidance adapter",
    ) -> str:
        """Upload the adapter with its model card to a model hub; the address of the commit."""
        return folder.push(self, repo_id, private, token, commit_message)
