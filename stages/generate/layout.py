"""How a pipeline lays out its guided steps, found by trying: which part of which denoiser call is the conditional one.

Pipelines double the batch or call the denoiser twice, put the conditional part first or last, and name and nest their
arguments as they like. None of it is assumed: a pass without guidance shows what the conditional inputs look like, and a
guided run is searched for them. What is not certain is refused before anything is recorded.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stages.denoiser import MASK, NEGATIVE, denoiser_of, latent_name, negative_tokens
from stages.errors import UserError
from stages.generate.scale import PerSampleScale
from stages.generate.watching import Call, Inputs, watched
from stages.sampling import Request, guider_of, sample, scale_keyword, undecoded

PROBED_STEPS = 2  # the second is judged: some rules of guidance leave the first one out
PROBED_SCALES = (3.0, 7.0)
SAME, DIFFERENT = 0.02, 0.05  # relative distances: text encoders round differently in other batches
TRUSTED = 0.25  # how far mixed scales may be from separate runs, as a share of what the scales change


@dataclass(frozen=True)
class Layout:
    """How one guided step of a pipeline is laid out.

    Attributes:
        latent: what the denoiser calls its latent.
        calls: denoiser calls per step; call: which of them is the conditional one.
        chunks: parts of the batch in that call, one sample of each trajectory in every part; chunk: the conditional one.
        per_sample: the denoiser's other arguments that have an entry per sample.
        masks: the denoiser's arguments that mask another one, `NAME_mask` beside NAME; what is not given masks nothing.
        constants: its other arguments, the same in every call, as JSON; in a list, `each` stands once per sample.
        timestep_scale: the denoiser's timestep over the scheduler's.
        target_channels: of what the scheduler is handed.
        learned_variance: whether the denoiser predicts its variance beside them.
        unconditional: call and chunk of the unconditional part, where there is one such part.
        scale_per_sample: whether one call of the pipeline can hold samples of several scales.
    """

    latent: str
    calls: int
    call: int
    chunks: int
    chunk: int
    per_sample: tuple[str, ...]
    masks: tuple[str, ...]
    constants: dict[str, Any]
    timestep_scale: float
    target_channels: int
    learned_variance: bool
    unconditional: tuple[int, int] | None = None
    scale_per_sample: bool = False

    def conditional(self, calls: list[Call], n: int) -> Call:
        """The conditional pass of one step for n samples, of its prediction the channels that the target has.

        A step that guidance leaves out has only this pass.
        """
        if len(calls) == self.calls:
            call = calls[self.call]
        elif len(calls) == 1:
            call = calls[0]
        else:
            raise UserError(f"{len(calls)} denoiser calls in one step where {self.calls} were found before")
        inputs = {
            name: self.part(value, n) if isinstance(value, Tensor) and name not in self.constants else value
            for name, value in call.inputs.items()
        }
        return Call(inputs, self.part(call.prediction, n)[:, : self.target_channels])

    def part(self, batch: Tensor, n: int) -> Tensor:
        """The conditional n samples of a batch of n, or of n for each part."""
        return batch if len(batch) == n else batch[self.chunk * n : (self.chunk + 1) * n]

    def conditions(self, inputs: Inputs, n: int) -> dict[str, Tensor]:
        """The tensors of the conditional inputs of n samples that belong to their samples.

        Raises:
            UserError: an argument changed that was the same in every call when the layout was found.
        """
        cond: dict[str, Tensor] = {}
        for name, value in inputs.items():
            if name in (self.latent, "timestep"):
                continue
            if isinstance(value, Tensor) and name not in self.constants:
                cond[name] = value.bool() if name in self.masks else value
            elif self.constants.get(name) not in (constant(value, n), constant(value, n * self.chunks)):
                raise UserError(
                    f"the denoiser's {name} changes from call to call: it cannot be stored with a trajectory"
                )
        return self._masked(cond)

    def negative(self, calls: list[Call], n: int) -> dict[str, Tensor]:
        """What `negative_tokens` finds in one step for n samples; nothing in a step that guidance leaves out."""
        if self.unconditional is None or len(calls) != self.calls:
            return {}
        number, chunk = self.unconditional
        inputs = calls[number].inputs
        if len(inputs[self.latent]) <= chunk * n:
            return {}
        return self._masked(negative_tokens(inputs, self.latent, slice(chunk * n, (chunk + 1) * n)))

    def _masked(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """With a mask, that masks nothing, where the denoiser takes one and was given none."""
        for name, value in list(cond.items()):
            if name.removeprefix(NEGATIVE) + MASK in self.masks:
                cond.setdefault(name + MASK, torch.ones(value.shape[:2], dtype=torch.bool, device=value.device))
        return cond

    def facts(self) -> dict[str, Any]:
        """What `dataset.json` tells of it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def constant(value: Any, rows: int) -> Any:
    """An argument that is the same in every call of so many rows, as JSON."""
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, list) and len(value) == rows and all(entry == value[0] for entry in value):
        return {"each": _plain(value[0])}
    return _plain(value)


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def guidance_rule(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The rule by which a pipeline guides, by name, with its settings."""
    guider = guider_of(pipe)
    if guider is not None:
        settings = {name: value for name, value in guider.config.items() if not name.startswith("_")}
        return {"name": type(guider).__name__} | {k: v for k, v in settings.items() if k != "guidance_scale"}
    defaults = inspect.signature(type(pipe).__call__).parameters
    told = {name: arguments.get(name, p.default) for name, p in defaults.items()}
    keyword = scale_keyword(pipe)
    named = {k: v for k, v in told.items() if ("guidance" in k or "pag_" in k) and k != keyword and _is_number(v)}
    return {"name": "ClassifierFreeGuidance", "pipeline": type(pipe).__name__} | named


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Seen:
    """One step of a probe: the denoiser's calls, the prediction, and the scheduler's timestep."""

    calls: list[Call]
    prediction: Tensor
    timestep: float


def probe(pipe: Any, request: Request, guidance_scale: float) -> list[Seen]:
    """Run a pipeline for two steps and keep what was seen."""
    steps: list[Seen] = []
    with undecoded(pipe), watched(pipe, lambda c, p, t: steps.append(Seen(c, p.clone(), float(t)))):
        sample(pipe, request, guidance_scale)
    return steps


def find_layout(pipe: Any, request: Request) -> Layout:
    """Try a pipeline out on the first condition of `request`.

    Raises:
        UserError: what was found is not certain.
    """
    once = replace(request, conditions=request.conditions[:1], seeds=[0], num_inference_steps=PROBED_STEPS)
    twice = replace(once, conditions=[*once.conditions, *once.conditions], seeds=[0, 0])
    alone = probe(pipe, once, 1.0)[0]
    if len(alone.calls) != 1:
        raise uncertain(pipe, f"without guidance it calls its denoiser {len(alone.calls)} times per step, not once")
    guided = probe(pipe, twice, PROBED_SCALES[0])
    layout = _place_conditional(pipe, alone.calls[0].inputs, guided[0])
    if layout.conditional(guided[0].calls, 2).prediction.shape != layout.part(guided[0].prediction, 2).shape:
        raise UserError(
            f"{type(pipe).__name__}: its scheduler is handed another shape than its denoiser predicts: such pipelines "
            "cannot be recorded"
        )
    return replace(layout, scale_per_sample=_scales_mix(pipe, twice, layout))


def _place_conditional(pipe: Any, alone: Inputs, guided: Seen) -> Layout:
    """Where in a guided step for two equal samples the inputs of a pass without guidance are found again."""
    denoiser: Any = denoiser_of(pipe)[1]
    name = latent_name(denoiser)
    rows = len(alone[name])
    reference = {k: v[:1] for k, v in alone.items() if k != name and isinstance(v, Tensor) and len(v) == rows}
    places = {
        (number, chunk): _unlikeness(reference, call.inputs, chunk)
        for number, call in enumerate(guided.calls)
        for chunk in range(len(call.inputs[name]) // 2)
    }
    same = [place for place, distance in places.items() if distance < SAME]
    if any(SAME <= distance < DIFFERENT for distance in places.values()):
        raise uncertain(pipe, f"of the {len(places)} parts of a guided step some are too much alike")
    if not same or len(same) == len(places):
        told = "all are alike" if same else "none is like the pass without guidance"
        raise uncertain(pipe, f"of the {len(places)} parts of a guided step {told}")
    number, chunk = same[0]
    different = [place for place in places if place not in same]
    call = guided.calls[number].inputs
    parameters = inspect.signature(denoiser.forward).parameters
    others = {k: v for k, v in call.items() if k not in (name, "timestep")}
    per_sample = tuple(k for k, v in others.items() if _has_entry_per_sample(v, alone.get(k), len(call[name]), rows))
    return Layout(
        latent=name,
        calls=len(guided.calls),
        call=number,
        chunks=len(call[name]) // 2,
        chunk=chunk,
        per_sample=per_sample,
        masks=tuple(k for k in parameters if k.endswith(MASK) and k.removesuffix(MASK) in parameters),
        constants={k: constant(v, len(call[name])) for k, v in others.items() if k not in per_sample},
        timestep_scale=_timestep_scale(float(call["timestep"][0]), guided.timestep),
        target_channels=guided.prediction.shape[1],
        unconditional=different[0] if len(different) == 1 else None,
        learned_variance=getattr(denoiser.config, "out_channels", None) == 2 * guided.prediction.shape[1],
    )


def _unlikeness(reference: Inputs, call: Inputs, chunk: int) -> float:
    """How far the inputs of a part of a call for two equal samples are from those of a pass without guidance."""
    compared = [name for name in reference if name in call and name != "timestep"]
    rows = slice(2 * chunk, 2 * chunk + 1)
    return max((distance(reference[name], call[name][rows]) for name in compared), default=float("inf"))


def _has_entry_per_sample(value: Any, before: Any, rows: int, rows_before: int) -> bool:
    """Whether an argument grew with the batch, from the pass of one sample to the guided step of two."""
    if not isinstance(value, Tensor) or not isinstance(before, Tensor) or not value.ndim * before.ndim:
        return False
    return len(value) == rows and len(before) == rows_before


def distance(one: Tensor, other: Tensor) -> float:
    """How far a tensor is from another, relative to their size; infinite where their shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else float("inf")
    size = torch.maximum(one.float().norm(), other.float().norm())
    return float((one.float() - other.float()).norm() / size.clamp(min=1e-12))


def _timestep_scale(of_denoiser: float, of_scheduler: float) -> float:
    ratio = of_denoiser / of_scheduler if of_scheduler else 1.0
    return min((1.0, 1e-3), key=lambda scale: abs(ratio / scale - 1))


def _scales_mix(pipe: Any, twice: Request, layout: Layout) -> bool:
    """Whether two scales in one call give what each gives alone.

    Raises:
        UserError: the scale changes nothing.
    """
    low, high = (layout.part(probe(pipe, twice, scale)[-1].prediction, 2) for scale in PROBED_SCALES)
    mixed = layout.part(probe(pipe, twice, PerSampleScale(torch.tensor(PROBED_SCALES)))[-1].prediction, 2)
    effect = float((high - low).float().norm())
    if effect == 0 or not torch.isfinite(torch.tensor(effect)):
        raise UserError(
            f"{type(pipe).__name__}: the prediction is the same at scales {PROBED_SCALES[0]:g} and {PROBED_SCALES[1]:g}, or "
            "not a number: this teacher cannot be guided"
        )
    error = float((mixed[0] - low[0]).float().norm() + (mixed[1] - high[1]).float().norm())
    return error < TRUSTED * effect


def uncertain(pipe: Any, found: str) -> UserError:
    return UserError(
        f"{type(pipe).__name__}: where the conditional pass lies is not certain: {found}: declare what its call needs "
        "(teacher.call.NAME=..., or CALL_DEFAULTS in stages/sampling.py)"
    )
