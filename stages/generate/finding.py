"""Find the layout of a pipeline's guided steps by trial runs.

Pipelines double the batch or call the denoiser twice, put the conditional part first or last, and name and nest their
arguments in many ways. The search assumes none of them: runs without guidance show the conditional inputs and which of
them belong to a sample; then the search looks for these inputs in a guided run. It refuses uncertain results before any
recording.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stages.base.arguments import Arguments, encoded
from stages.base.denoiser import MASK, denoiser_of, denoisers_of, part_of
from stages.base.hooks import Call
from stages.base.pictures import PICTURES
from stages.base.sampling import Request, guider_of, scale_keyword
from stages.errors import UserError
from stages.generate.layout import Layout, constants_of
from stages.generate.probing import (
    DIFFERENT,
    PROBED_SCALES,
    SAME,
    DoesNotRunError,
    Seen,
    distance,
    format_rows,
    has_rows,
    probe,
    probe_at,
    uncertain,
)
from stages.generate.sample_axes import find_arguments, relation_of_timesteps
from stages.generate.scale import PerSampleScale
from stages.generate.trial import check_trial
from stages.generate.unguided import Unguided, without_guidance

TRUSTED = 0.25  # how far mixed scales may deviate from separate runs, as a share of the scales' effect
JUST_ABOVE = 1.001  # a guidance scale just above 1
OFFSET = 0.25  # share of the effect of scale 2 above which a difference is no rounding


def find_layout(pipe: Any, request: Request, expected_steps: int | None = None) -> Layout:
    """Find a pipeline's layout by trial runs on the first condition of `request`.

    Three inference steps suffice for guidance that has as many passes at each step.

    Args:
        expected_steps: the number of steps that its scheduler should take.

    Raises:
        UserError: the result is not certain.
    """
    once = replace(request, conditions=request.conditions[:1], seeds=[0])
    twice = replace(once, conditions=[*once.conditions, *once.conditions], seeds=[0, 0])
    unguided = without_guidance(pipe, once, twice)
    taken = len(unguided.one)
    if expected_steps is not None and taken != expected_steps:
        raise UserError(
            f"{type(pipe).__name__} cannot be recorded so: it takes {taken} steps, where its scheduler makes {expected_steps}: "
            "leave out what cuts or repeats them (teacher.call.NAME=...)"
        )
    try:
        guided = probe(pipe, once if unguided.two is None else twice, PROBED_SCALES[0])
    except DoesNotRunError:
        if unguided.two is None:
            raise
        unguided = replace(unguided, two=None)  # with guidance, a call takes only one sample
        guided = probe(pipe, once, PROBED_SCALES[0])
    if len(guided) != taken:
        raise uncertain(pipe, f"it makes {len(guided)} steps with guidance and {taken} without")
    several = once if unguided.two is None else twice
    layout = place_conditional(pipe, find_arguments(pipe, unguided), unguided, guided, len(several.seeds))
    # Some pipelines take several pictures as those of one sample.
    pictured = not {*PICTURES}.isdisjoint(once.conditions[0])
    layout = replace(
        layout,
        one_sample=layout.one_sample or pictured,
        scale_per_sample=scales_mix(pipe, several, layout),
        scale_offset=scale_offset(pipe, once, unguided),
    )
    check_trial(pipe, layout, layout.conditional(unguided.steps[-1].calls, len(several.seeds)))
    return layout


Place = tuple[int, int]  # of a part of a guided step: the index of its call, and of its chunk in the call


def place_conditional(pipe: Any, arguments: Arguments, unguided: Unguided, guided: list[Seen], n: int) -> Layout:
    """The layout of a guided step for n equal samples, from the unguided pass whose inputs it repeats."""
    (number, chunk), unconditional = find_parts(pipe, arguments, unguided, guided, n)
    full = fullest(arguments, guided)
    alone, call, denoiser = unguided.steps[-1].calls[0], full.calls[number], denoiser_of(pipe)[1]
    rows = arguments.rows(call.inputs)
    check_other_steps(pipe, arguments, unguided, guided, (number, chunk), n)
    for name, value in constants_of(call.inputs, arguments).items():
        if name not in alone.inputs and has_rows(value, rows):
            raise UserError(
                f"{type(pipe).__name__} cannot be recorded: its denoiser is given {name} with guidance only, which one pass would "
                "not have: take another class (teacher.pipeline_class=...)"
            )
    arguments = replace(arguments, constants=recorded_constants(pipe, call, arguments))
    parameters = inspect.signature(denoiser.forward).parameters
    targets = _find_targets(pipe, arguments, unguided.steps[-1])
    scale, offset = relation_of_timesteps(pipe, arguments, unguided.one)
    return Layout(
        arguments=arguments,
        calls=len(full.calls),
        call=number,
        chunks=rows // n,
        chunk=chunk,
        masks=tuple(k for k in parameters if k.endswith(MASK) and k.removesuffix(MASK) in parameters),
        denoisers=tuple(denoisers_of(pipe)),
        timestep_scale=scale,
        timestep_offset=offset,
        target_channels=tuple(channels for _, channels in targets),
        target_signs=tuple(sign for sign, _ in targets),
        learned_variance=alone.prediction.shape[1] == 2 * targets[0][1],
        no_guidance=unguided.settings,
        unconditional=unconditional,
        one_sample=unguided.two is None or unguided.mixed_up or bool(unguided.following),
        parts=tuple(sorted({parts_of(arguments, step, n) for step in guided})),
    )


def fullest(arguments: Arguments, guided: list[Seen]) -> Seen:
    """The step with the most rows, the last one of several: some rules skip steps, or a pass at some."""
    most = max(sum(arguments.rows(call.inputs) for call in step.calls) for step in guided)
    return [step for step in guided if sum(arguments.rows(call.inputs) for call in step.calls) == most][-1]


def parts_of(arguments: Arguments, step: Seen, n: int) -> tuple[int, ...]:
    """The number of parts, each with a row for every one of n samples, in each call of a step."""
    return tuple(arguments.rows(call.inputs) // n for call in step.calls)


def check_other_steps(
    pipe: Any, arguments: Arguments, unguided: Unguided, guided: list[Seen], place: Place, n: int
) -> None:
    """Check that the conditional part keeps its place at the steps that have fewer parts.

    Raises:
        UserError: it does not.
    """
    reference = arguments.samples(unguided.steps[-1].calls[0].inputs, 0, n)
    full = parts_of(arguments, fullest(arguments, guided), n)
    for parts, step in {parts_of(arguments, step, n): step for step in guided}.items():
        if parts in (full, (1,)):
            continue
        number, chunk = place
        there = number < len(parts) and chunk < parts[number]
        if not there or _input_distance(arguments, reference, step.calls[number].inputs, chunk * n, n) >= SAME:
            raise uncertain(pipe, "at some steps it lies elsewhere than at others")


def find_parts(
    pipe: Any, arguments: Arguments, unguided: Unguided, guided: list[Seen], n: int
) -> tuple[Place, Place | None]:
    """The places of the conditional part of a guided step, and of the unconditional one if there is exactly one.

    Raises:
        UserError: the conditional part is not certain.
    """
    step = fullest(arguments, guided)
    rows = [arguments.rows(call.inputs) for call in step.calls]
    if any(count % n for count in rows):
        raise uncertain(pipe, f"a guided step for {n} samples has {format_rows(rows)}")
    places = [(number, chunk) for number, count in enumerate(rows) for chunk in range(count // n)]
    if len(places) == 1:
        raise UserError(
            f"{type(pipe).__name__} cannot be recorded: it calls its denoiser once per step at every scale: its guidance is "
            "distilled already, comes from another network, or needs an argument (teacher.call.NAME=..., a negative_prompt)"
        )
    reference = arguments.samples(unguided.steps[-1].calls[0].inputs, 0, n)
    differences = {
        place: _input_distance(arguments, reference, step.calls[place[0]].inputs, place[1] * n, n) for place in places
    }
    if any(SAME <= difference < DIFFERENT for difference in differences.values()):
        raise uncertain(pipe, f"of the {len(places)} parts of a guided step some are too much alike")
    same = [place for place in places if differences[place] < SAME]
    different = [place for place in places if place not in same]
    if not (same and different):
        message = "all are alike" if same else "none is like the pass without guidance"
        raise uncertain(pipe, f"of the {len(places)} parts of a guided step {message}")
    conditional = min(same, key=lambda place: _prediction_distance(arguments, unguided.steps[0], guided[0], place, n))
    return conditional, different[0] if len(different) == 1 else None


def _input_distance(arguments: Arguments, reference: dict[str, Any], call: dict[str, Any], begin: int, n: int) -> float:
    """The largest distance of any input of n samples in a call from that of the unguided pass."""
    samples = arguments.samples(call, begin, begin + n)
    compared = [name for name in arguments.conditions if name in reference and name in samples]
    return max((distance(reference[name], samples[name]) for name in compared), default=float("inf"))


def _prediction_distance(arguments: Arguments, alone: Seen, guided: Seen, place: Place, n: int) -> float:
    """The distance of a part's prediction in the first guided step from the unguided one, which has the same latents.

    It separates the conditional part from one with the same inputs and a perturbed network.
    """
    number, chunk = place
    if number >= len(guided.calls) or arguments.rows(guided.calls[number].inputs) < (chunk + 1) * n:
        return float("inf")
    return distance(alone.calls[0].prediction, guided.calls[number].prediction[chunk * n : (chunk + 1) * n])


def recorded_constants(pipe: Any, call: Call, arguments: Arguments) -> dict[str, Any]:
    constants, rows = constants_of(call.inputs, arguments), arguments.rows(call.inputs)
    values = {}
    for name, value in constants.items():
        try:
            values[name] = encoded(value, rows)
        except TypeError as error:
            raise UserError(
                f"{type(pipe).__name__} cannot be recorded: its denoiser is given {name}, {error}, which cannot be stored with "
                "records: switch that off (teacher.call.NAME=...), or take another class (teacher.pipeline_class=...)"
            ) from error
    return values


def _find_targets(pipe: Any, arguments: Arguments, step: Seen) -> list[tuple[int, int]]:
    """The result of `_find_target` for each prediction of an unguided step that a scheduler steps by.

    Raises:
        UserError: a second latent changes from step to step, but no copy of the scheduler receives its prediction.
    """
    call = step.calls[0]
    shapes = {call.inputs[name].shape for name in arguments.steps if isinstance(call.inputs.get(name), Tensor)}
    if len(call.predictions) < len(step.received) or shapes & {
        part.shape for part in call.predictions[len(step.received) :]
    }:
        raise UserError(
            f"{type(pipe).__name__} cannot be recorded: its denoiser predicts {len(call.predictions)} latents, of which its "
            f"scheduler and copies of it step {len(step.received)}: take another class (teacher.pipeline_class=...)"
        )
    return [_find_target(pipe, own, received) for own, received in zip(call.predictions, step.received, strict=False)]


def _find_target(pipe: Any, prediction: Tensor, received: Tensor) -> tuple[int, int]:
    """(sign, channels) of the prediction that the scheduler receives, from an unguided pass; see `Layout`.

    Raises:
        UserError: the scheduler receives something else.
    """
    count = received.shape[1] if received.ndim > 1 else 0
    fits = False
    for channels in (0, count, -count) if count else ():
        own = part_of(prediction, channels)
        fits = own.numel() == received.numel()
        for sign in (1, -1) if fits else ():
            if distance(sign * own.reshape(received.shape), received) < SAME:
                return sign, channels
    message = "something else than" if fits else "another shape than"
    raise UserError(
        f"{type(pipe).__name__}: its scheduler receives {message} its denoiser predicts, so that the records could not be "
        "trained on: such pipelines cannot be recorded; take another pipeline class of the model (teacher.pipeline_class)"
    )


def scales_mix(pipe: Any, several: Request, layout: Layout) -> bool:
    """Whether a call with two scales predicts the same as a call with each scale alone.

    Raises:
        UserError: the scale has no effect.
    """
    n = len(several.seeds)
    low, high = (layout.part(probe(pipe, several, scale)[-1].prediction, n) for scale in PROBED_SCALES)
    effect = float((high - low).float().norm())
    if effect == 0 or not torch.isfinite(torch.tensor(effect)):
        raise UserError(
            f"{type(pipe).__name__}: the prediction is the same at scales {PROBED_SCALES[0]:g} and {PROBED_SCALES[1]:g}, or "
            "not a number: this teacher cannot be guided"
        )
    if n == 1:
        return False
    try:
        mixed = layout.part(probe(pipe, several, PerSampleScale(torch.tensor(PROBED_SCALES)))[-1].prediction, n)
    except DoesNotRunError:
        return False
    error = float((mixed[0] - low[0]).float().norm() + (mixed[1] - high[1]).float().norm())
    return error < TRUSTED * effect


def scale_offset(pipe: Any, once: Request, unguided: Unguided) -> float:
    """`w` less the pipeline's scale: 0 for the rule `u + w (c - u)`, 1 for the rule `c + w (c - u)`.

    At a scale just above 1, the first rule adds nothing to the conditional prediction; the second adds as much as from
    1 to 2.
    """
    guider = guider_of(pipe)
    if guider is not None:
        return float(getattr(guider, "use_original_formulation", False))
    keyword = scale_keyword(pipe)
    at_one, at_two = (probe_at(pipe, once, unguided.settings | {keyword: scale}) for scale in (JUST_ABOVE, 2.0))
    for none, one, two in zip(unguided.one, at_one, at_two, strict=True):
        c, at_1, at_2 = (step.prediction.float() for step in (none, one, two))
        if c.shape == at_2.shape and distance(c, at_2) > 0:  # the first guided step: the latents are still equal
            difference = float(((at_1 - c) - (at_2 - at_1)).norm())  # 0 under the second rule
            return float(difference < OFFSET * float((at_2 - at_1).norm()))
    return 0.0
