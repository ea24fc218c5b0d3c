"""The contract of every variant: where it sits, what it is given, how it rides on a denoiser."""

from __future__ import annotations

import inspect
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.adapters import folder
from stages.adapters.conditioning import Conditioning, Known, choose_conditions
from stages.adapters.config import NEGATIVE_TOKENS, TIMESTEP, AdapterConfig
from stages.adapters.guidance import Guidance, Prepared, Scales, ScaleSchedule, Table, as_scales
from stages.adapters.one_pass import OnePass
from stages.adapters.sites import Shape, find_sites, layer_beneath
from stages.denoiser import denoiser_of, flatten, forget_compiled, uncompiled
from stages.errors import UserError

MARK = "guides"  # on the hook of an adapter


class Site(nn.Module, ABC):
    """The adapter's part at one site.

    What does not depend on the image is prepared apart, because it can be computed once for a whole schedule.
    """

    def of_step(self, known: Known) -> tuple[Tensor, ...]:
        """What depends on scale, timestep and whole conditions: tensors `[n, ...]`."""
        return ()

    def of_tokens(self, known: Known) -> tuple[Tensor, ...]:
        """What depends on the conditions' tokens alone: tensors `[n, ...]`."""
        return ()

    @abstractmethod
    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        """What is added to the site's output, `[n, length, width]` or broadcastable to it, zero at the start.

        Args:
            tokens: `[n, length, width]`, what the site was given.
            prepared: what `of_step` and `of_tokens` gave.
        """


class GuidanceAdapter(nn.Module, ABC):
    """A small trained part that makes one conditional pass of a frozen denoiser predict the guided output.

    It rides on forward hooks: no module and no attention processor is replaced, state-dict keys stay as they are. Its
    output is zero at the start, so that attached and untrained it changes nothing, bit for bit. Adapter guidance
    distillation: arXiv 2503.07274.

    Attributes:
        config: the variant and its sizes, complete.
        shapes: the sites by name, with the widths of each.
        about: what the folder tells besides: conditions, trained scale range, guidance gain, base.
    """

    variant: ClassVar[str]
    default_sites: ClassVar[tuple[str, ...]] = ("attention",)
    default_conditions: ClassVar[tuple[str, ...]] = ("timestep", "pooled")
    default_rank: ClassVar[int] = 16
    variants: ClassVar[dict[str, type[GuidanceAdapter]]] = {}

    def __init_subclass__(cls) -> None:
        GuidanceAdapter.variants[cls.variant] = cls

    def __init__(self, config: AdapterConfig, shapes: dict[str, Shape], about: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.shapes, self.about = config, shapes, about
        self.conditioning = self.new_conditioning()
        self.sites = nn.ModuleDict({name.replace(".", "/"): self.new_site(*shape) for name, shape in shapes.items()})
        self._handles: list[RemovableHandle] = []
        self._denoiser: weakref.ref[nn.Module] | None = None
        self._pipelines: list[OnePass] = []
        self.guidance: Guidance | None = None
        self.schedule: ScaleSchedule | None = None
        self.warned = False  # of a negative prompt
        self.prepared: Prepared | None = None
        self.gate: Tensor | None = None

    # What a variant is

    @abstractmethod
    def new_site(self, width_in: int, width_out: int) -> Site:
        """The part of this variant for a site of these widths."""

    def new_conditioning(self) -> Conditioning | None:
        """What it sees; None for a variant that sees nothing, not even the scale."""
        wanted = list(self.config.conditions or [])
        chosen = choose_conditions(self.about["conditions"], wanted)
        return Conditioning(self.config.hidden_size, chosen, self.about["timestep_scale"], TIMESTEP in wanted)

    @property
    def sees_negative(self) -> bool:
        """Whether it knows the tokens of the unconditional pass."""
        return NEGATIVE_TOKENS in (self.config.conditions or [])

    @property
    def rank(self) -> int:
        return self.config.rank or self.default_rank

    @classmethod
    def find(cls, denoiser: nn.Module, config: AdapterConfig, about: dict[str, Any]) -> dict[str, Shape]:
        """The sites of this variant in a denoiser."""
        return find_sites(denoiser, list(config.sites or []))

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
    def described(cls, about: dict[str, Any], denoiser: nn.Module) -> dict[str, Any]:
        """What the folder tells besides, with what of the base this variant needs to know."""
        return about

    def start_from(self, denoiser: nn.Module) -> None:
        """Take from the base what an untrained adapter begins with."""

    @staticmethod
    def kind(variant: str) -> type[GuidanceAdapter]:
        """The class of a variant.

        Raises:
            UserError: there is none of that name.
        """
        if variant not in GuidanceAdapter.variants:
            raise UserError(f"adapter.variant={variant}: one of {', '.join(sorted(GuidanceAdapter.variants))}")
        return GuidanceAdapter.variants[variant]

    @staticmethod
    def for_denoiser(config: AdapterConfig, denoiser: nn.Module, about: dict[str, Any]) -> GuidanceAdapter:
        """A new adapter, untrained, for the sites that are found in a denoiser."""
        kind = GuidanceAdapter.kind(config.variant)
        config, about = kind.completed(config), kind.described(about, denoiser)
        adapter = kind(config, kind.find(denoiser, config, about), about)
        adapter.start_from(denoiser)
        return adapter

    # Attaching

    def attach(self, target: Any) -> GuidanceAdapter:
        """Ride on a denoiser, or on a pipeline, whose `guidance_scale` then means this adapter in a single pass.

        Further pipelines with the same denoiser (image to image, inpainting) can be attached too. The sites take a pipeline's
        precision, and the adapter follows the latents to their device.

        Raises:
            UserError: it rides already, or the base has other sites than the adapter was made for.
        """
        is_denoiser = isinstance(target, nn.Module)
        denoiser: Any = uncompiled(target) if is_denoiser else denoiser_of(target)[1]
        again = is_denoiser or any(pipeline.pipe is target for pipeline in self._pipelines)
        if self._denoiser is not None and (again or self._denoiser() is not denoiser):
            raise UserError("this adapter is attached already: detach it first")
        if self._denoiser is None:
            if carries_adapter(denoiser):
                raise UserError(
                    f"this {type(denoiser).__name__} carries an adapter already (a copy carries the original's): detach that one "
                    "first, or load the pipeline anew"
                )
            self.check_fit(denoiser)
            self._handles.extend(self._hooks(denoiser))
            self._denoiser = weakref.ref(denoiser)
            forget_compiled(target if is_denoiser else getattr(target, denoiser_of(target)[0]))
        if not is_denoiser:
            self._pipelines.append(OnePass(target, self))
            self.sites.to(dtype=denoiser.dtype)
        return self

    def detach(self) -> None:
        """Leave the base as it was."""
        for handle in self._handles:
            handle.remove()
        for pipeline in self._pipelines:
            pipeline.undo()
        self._handles.clear()
        self._pipelines.clear()
        self._denoiser = None

    def check_carried(self, denoiser: nn.Module) -> None:
        """
        Raises:
            UserError: no adapter rides on a denoiser that is about to run.
        """
        if not carries_adapter(denoiser):
            raise UserError(
                f"this {type(denoiser).__name__} took the place of the one that the adapter was attached to: detach it, and attach it anew"
            )

    def check_fit(self, denoiser: nn.Module) -> None:
        """
        Raises:
            UserError: the base has other sites.
        """
        found = self.find(denoiser, self.config, self.about)
        for name in [*self.shapes, *found]:
            if found.get(name) != self.shapes.get(name):
                here, there = (told(shapes.get(name)) for shapes in (self.shapes, found))
                raise UserError(
                    f"the adapter does not fit this {type(denoiser).__name__}: at {name} it was made for {here}, "
                    f"the base has {there}: attach it to a base of the architecture it was trained on"
                )

    def _hooks(self, denoiser: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks are plain functions: a deep copy of the denoiser shares them, and so is guided by this adapter too."""
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            changed = self.before_forward(module, {name: given[name] for name in names if name in given})
            return None if changed is None else ((), changed)

        vars(before)[MARK] = True

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return self.after_forward(module, output)

        yield denoiser.register_forward_pre_hook(before, with_kwargs=True)
        yield denoiser.register_forward_hook(after, with_kwargs=True, always_call=True)
        yield from self.site_hooks(denoiser)

    def site_hooks(self, denoiser: nn.Module) -> Iterator[RemovableHandle]:
        """Have each site add its part to its module's output."""
        for i, (name, site) in enumerate(zip(self.shapes, self.sites.values(), strict=True)):
            module = layer_beneath(denoiser.get_submodule(name))
            yield module.register_forward_hook(self._hook(i, site), with_kwargs=True)

    def _hook(self, i: int, site: nn.Module) -> Callable[..., Any]:

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.prepared is None:
                return None
            tokens = args[0] if args else kwargs["hidden_states"]
            return self.added(output, site(tokens.to(self.dtype), *self.prepared[i]))

        return add

    def added(self, output: Any, change: Tensor) -> Any:
        """An output with the change of its guided samples; of joint attention the image's tokens come first."""
        if isinstance(output, tuple):
            return (self.added(output[0], change), *output[1:])
        if self.gate is not None:
            change = change * self.gate.view(-1, *[1] * (change.ndim - 1))
        return output + change.to(output.dtype)

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
        inputs = flatten(given) | guidance.negative
        latent = next(iter(inputs.values()))
        self._follow(latent.device)
        guidance.to(latent.device)
        timestep = torch.as_tensor(inputs["timestep"], device=latent.device)
        row = guidance.row(timestep)
        scale = guidance.at(row, len(latent))
        self.gate = scale != 1 if guidance.mixed else None
        if guidance.cached:
            guidance.table = guidance.table or self._tabulate(*guidance.every(len(latent)), inputs)
            self.prepared = guidance.table.at(row)
        else:
            self.prepared = self._prepare(scale, timestep.expand(len(latent)), inputs)
        return None

    def after_forward(self, denoiser: nn.Module, output: Any) -> Any:
        """Keep nothing, but in training: blocks that are checkpointed run again in the backward pass."""
        if not torch.is_grad_enabled():
            self.prepared = self.gate = None
        return None

    def _follow(self, device: torch.device) -> None:
        if next(self.parameters()).device != device:
            self.to(device)

    def _prepare(self, scale: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Prepared:
        if self.conditioning is None:
            return [() for _ in self.sites]
        known = self.conditioning(self._asked(scale), timestep, self.conditioning.embed(inputs)).to(self.dtype)
        return [(*site.of_step(known), *site.of_tokens(known)) for site in self._each_site()]

    def _tabulate(self, timesteps: Tensor, scales: Tensor, inputs: dict[str, Any]) -> Table:
        """The table of a schedule of timesteps `[steps]` and scales `[steps, n]`."""
        if self.conditioning is None:
            return Table([() for _ in self.sites], [() for _ in self.sites], len(timesteps))
        steps, n = len(timesteps), scales.shape[1]
        embedded = self.conditioning.embed(inputs)
        every = replace(embedded, wholes=embedded.wholes.repeat(steps, 1, 1))
        asked = self._asked(scales).expand(steps, n).flatten()
        known = self.conditioning(asked, timesteps.repeat_interleave(n), every).to(self.dtype)
        of_step = [site.of_step(known) for site in self._each_site()]
        return Table(of_step, [site.of_tokens(known) for site in self._each_site()], steps)

    def _asked(self, scale: Tensor) -> Tensor:
        """The scales that the variant is given for those wanted: more by the guidance gain, which leads none out of the training."""
        gain, most = self.about.get("guidance_gain", 1.0), self.about["scale_range"][1]
        return torch.minimum(scale + (gain - 1) * (scale - 1), scale.clamp(min=most))

    def _each_site(self) -> list[Site]:
        return [site for site in self.sites.values() if isinstance(site, Site)]

    # The guidance scale

    @contextmanager
    def guidance_scale(self, scale: Scales) -> Iterator[None]:
        """Within it, the denoiser guides itself: one scale for all images of a batch, or one per image.

        It comes before the scale of a pipeline's call. A scale of 1 is an exact bypass, and so is one below, as in diffusers.
        A scale outside the trained range warns.
        """
        guidance = Guidance(as_scales(scale)[None])
        self.warn_outside(guidance.scales)
        with self.in_force(guidance):
            yield

    @contextmanager
    def guidance_schedule(self, schedule: ScaleSchedule) -> Iterator[None]:
        """Within it, attached pipelines guide by step: an interval, a ramp.

        Args:
            schedule: one entry per step, each as `guidance_scale` takes it, or a function of the step and its timestep (as the
                scheduler counts: from 1000 down) that gives one. A scale of 1 is no guidance at that step.
        """
        if not self._pipelines:
            raise UserError("a schedule of scales needs a pipeline, which knows the steps: attach the adapter to one")
        before, self.schedule = self.schedule, schedule
        try:
            yield
        finally:
            self.schedule = before

    def enable_schedule_cache(self, pipe: Any, num_inference_steps: int, guidance_scale: Scales | None = None) -> None:
        """Compute what does not depend on the image once per call of a pipeline, for all steps, and no more at each step.

        Args:
            num_inference_steps, guidance_scale: calls with these are cached, others are not; every scale by default.
        """
        self._attached(pipe).cache(num_inference_steps, guidance_scale)

    def disable_schedule_cache(self, pipe: Any) -> None:
        """Compute at each step again."""
        self._attached(pipe).cached = None

    def _attached(self, pipe: Any) -> OnePass:
        for pipeline in self._pipelines:
            if pipeline.pipe is pipe:
                return pipeline
        raise UserError(f"the adapter is not attached to this {type(pipe).__name__}: attach it first")

    @contextmanager
    def in_force(self, guidance: Guidance) -> Iterator[None]:
        """Within it, the denoiser guides itself so."""
        before, self.guidance = self.guidance, guidance
        try:
            yield
        finally:
            self.guidance = before

    def warn_outside(self, scales: Tensor) -> None:
        """Say where scales lie outside the range of the training."""
        low, high = self.about["scale_range"]
        outside = scales[(scales != 1) & ((scales < low) | (scales > high))]
        if len(outside):
            trained = f"the range {low:g} to {high:g} that" if low < high else f"{low:g}, the one scale that"
            warnings.warn(
                f"guidance_scale {outside[0]:g} is outside {trained} this adapter was trained at",
                stacklevel=5,
            )

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
        chosen, shapes, about, weights = folder.load(name_or_path, **source)
        with folder.named(name_or_path):
            config = AdapterConfig(**chosen)
            adapter = GuidanceAdapter.kind(config.variant)(config, shapes, about)
            adapter.load_state_dict(weights)
        return adapter.eval()

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload guidance adapter",
    ) -> str:
        """Upload the adapter with its model card to a model hub; the address of the commit."""
        return folder.push(self, repo_id, private, token, commit_message)


def carries_adapter(denoiser: nn.Module) -> bool:
    """Whether an adapter rides on it; a deep copy shares the hooks of its original."""
    return any(MARK in getattr(hook, "__dict__", {}) for hook in denoiser._forward_pre_hooks.values())


def told(shape: Shape | None) -> str:
    """A site's shape for a person."""
    if shape is None:
        return "no site"
    return f"width {shape[0]}" if shape[0] == shape[1] else f"widths {shape[0]} to {shape[1]}"
