"""Held-out trajectories are sampled again while an adapter trains: in one pass, from their own noise and conditions.

The first record's latent is the noise, and stepping the teacher's scheduler over the recorded targets gives the result
of two passes. So neither teacher nor text encoder is needed. Whether a dataset supports this is tried: the recorded
targets must lead to the recorded latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional

from stages.base.loading import diffusers_class, first_line
from stages.base.noise_levels import place
from stages.base.patching import replaced
from stages.records.dataset import Dataset
from stages.records.teacher import TeacherFacts
from stages.train.batch import Batch, concatenate
from stages.train.bins import Range
from stages.train.selection import SelectedSample
from stages.train.student import Student
from stages.train.window import Window, load

EACH = 4  # trajectories at each of two scales
SAME_STEP = 0.1  # share of a step by which its result may miss the recorded one
Predict = Callable[[Batch], Tensor]


class NotSampledError(Exception):
    """A dataset's trajectories cannot be sampled again; the message is the reason."""


@dataclass(frozen=True)
class Samples:
    """The final latents of each trajectory, those at lower scales first, and the share of the gap that is closed.

    Attributes:
        sizes: the name of each trajectory's size.
        unguided, two_passes, one_pass: without guidance, as recorded, and with the adapter.
        gap_closed: by the trajectories' mean scale, as `scale_2.5`.
    """

    sizes: list[str]
    unguided: list[Tensor]
    two_passes: list[Tensor]
    one_pass: list[Tensor]
    gap_closed: dict[str, float]


class HeldOutSampling:
    """Samples a few held-out trajectories near two scales, always the same.

    A measurement costs one denoiser evaluation per trajectory and step; the first costs two. All processes make the
    same one, because they would otherwise wait.

    Raises:
        NotSampledError: the dataset does not support it.
        DamageError: a sample is damaged.
    """

    def __init__(
        self,
        dataset: Dataset,
        samples: list[SelectedSample],
        scale_range: Range,
        device: str,
        skip_damaged: bool = False,
        batch_size: int = 2 * EACH,
    ) -> None:
        """
        Args:
            batch_size: how many trajectories the denoiser is given at a time; a GPU has room for a training batch.
        """
        check_supported(dataset)
        self.device, self.teacher, self.batch_size = device, dataset.info.teacher, batch_size
        self.steps = dataset.plan.config["num_inference_steps"]
        self.held_out: list[HeldOut] = []
        self.two_passes: list[Tensor] = []
        self.unguided: list[Tensor] = []
        self.counts: list[int] = []
        for near in choose(samples, scale_range):
            before = len(self.held_out)
            for window in (whole_trajectory(dataset, index, skip_damaged) for index in near):
                if window.intact.all():
                    self._add(window)
            self.counts.append(len(self.held_out) - before)
        if not self.held_out:
            raise NotSampledError("no held-out trajectory has guidance, or all are damaged")

    def _add(self, window: Window) -> None:
        try:
            run = Run(self.teacher, self.steps, window)
            run.begin_at(0)
            noise, nothing = run.latents, torch.empty(len(window), 0)
            self.two_passes.append(follow(run))
        except NotSampledError:
            raise
        except Exception as error:  # a scheduler may raise anything outside its own pipeline
            raise NotSampledError(
                f"{self.teacher.scheduler_class}: {type(error).__name__}: {first_line(error)}"
            ) from error
        records = replace(window.records, latent=nothing, target=nothing)
        self.held_out.append(HeldOut(noise, replace(window, records=records)))

    @property
    def sizes(self) -> list[str]:
        """The name of each trajectory's size."""
        return [held_out.window.size for held_out in self.held_out]

    @property
    def evaluations(self) -> int:
        """The denoiser evaluations of one measurement."""
        return sum(len(held_out.window) for held_out in self.held_out)

    @torch.no_grad()
    def measure(self, student: Student, gain: float = 1.0) -> Samples:
        """Sample in one pass.

        Args:
            gain: the guidance gain that the adapter would be stored with.
        """

        def unguided(batch: Batch) -> Tensor:
            return student.predict(batch.to(self.device, student.dtype), guided=False)

        def guided(batch: Batch) -> Tensor:
            scale = student.adapter.scale_with_gain(batch.scale, gain)
            return student.predict(replace(batch, scale=scale).to(self.device, student.dtype))

        with replaced(student, "call", student.denoiser):  # compiling for these few passes would take longer
            self.unguided = self.unguided or self._sample(unguided)
            one_pass = self._sample(guided)
        return Samples(self.sizes, self.unguided, self.two_passes, one_pass, self._gap_closed(one_pass))

    def _gap_closed(self, one_pass: list[Tensor]) -> dict[str, float]:
        left, gap = (
            torch.stack([functional.mse_loss(*pair) for pair in zip(latents, self.two_passes, strict=True)])
            for latents in (one_pass, self.unguided)
        )
        scales = torch.stack([held_out.window.records.scale[0] for held_out in self.held_out])
        parts = zip(*(values.split(self.counts) for values in (scales, left, gap)), strict=True)
        return {f"scale_{s.mean():.3g}": float(1 - one.mean() / none.mean()) for s, one, none in parts if len(s)}

    def _sample(self, predict: Predict) -> list[Tensor]:
        """The final latents of each trajectory; those of one size are sampled together."""
        shapes = [(h.window.size, len(h.window), *h.noise.shape) for h in self.held_out]
        final: dict[int, Tensor] = {}
        for shape in sorted(set(shapes)):
            places = [i for i, found in enumerate(shapes) if found == shape]
            runs = [self._begin(self.held_out[i]) for i in places]
            final |= zip(places, sample(runs, predict, self.batch_size), strict=True)
        return [final[i] for i in range(len(shapes))]

    def _begin(self, held_out: HeldOut) -> Run:
        run = Run(self.teacher, self.steps, held_out.window)
        run.latents = held_out.noise
        return run


class HeldOut(NamedTuple):
    """A trajectory's noise `[1, ...]`, and its records without latents and targets, which take memory."""

    noise: Tensor
    window: Window


class Run:
    """A trajectory's scheduler at its recorded timesteps, and the latents `[1, ...]` that it steps."""

    def __init__(self, teacher: TeacherFacts, num_inference_steps: int, window: Window) -> None:
        layout, self.window = teacher.layout, window
        self.sign = layout.target_signs[0]
        precisions = (window.records.latent.dtype, getattr(torch, teacher.torch_dtype))
        self.rounding = max(torch.finfo(dtype).eps for dtype in precisions)
        kind = diffusers_class(teacher.scheduler_class, "the dataset's scheduler")
        self.scheduler: Any = kind.from_config(teacher.scheduler_config)
        timesteps = (window.records.timestep.double() - layout.timestep_offset) / layout.timestep_scale
        place(self.scheduler, timesteps, num_inference_steps)
        self.latents = torch.empty(0)

    def begin_at(self, step: int) -> None:
        """Take the recorded latents of a step, without the scheduler's scaling."""
        given = self.window.records.latent[step : step + 1].float()
        self.latents = given / self._scaled(torch.ones_like(given), step)

    def batch(self, step: int) -> Batch:
        """The step's record, with the latents as they are."""
        return replace(self.window.take(torch.tensor([step])), latent=self._scaled(self.latents, step))

    def _scaled(self, latents: Tensor, step: int) -> Tensor:
        scale = getattr(self.scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, self.scheduler.timesteps[step])

    def step(self, step: int, prediction: Tensor) -> None:
        """
        Raises:
            NotSampledError: the prediction `[1, ...]` is not one of such latents.
        """
        if prediction.shape != self.latents.shape:
            raise NotSampledError("the denoiser is given something else than the latents that the scheduler steps")
        given = (self.sign * prediction, self.scheduler.timesteps[step], self.latents)
        with torch.random.fork_rng(devices=[]):  # a scheduler may draw noise that has no effect
            self.latents = self.scheduler.step(*given, return_dict=False)[0]


def sample(runs: list[Run], predict: Predict, most: int) -> list[Tensor]:
    """Step trajectories of one size, from their noise to the final latents `[...]` of each.

    Args:
        most: how many the denoiser is given at a time.
    """
    for step in range(len(runs[0].window)):
        for together in (runs[i : i + most] for i in range(0, len(runs), most)):
            predictions = predict(concatenate([run.batch(step) for run in together])).float().cpu()
            for run, prediction in zip(together, predictions, strict=True):
                run.step(step, prediction[None])
    return [run.latents[0] for run in runs]


def follow(run: Run) -> Tensor:
    """Step from each recorded latent by the recorded target, to the final latents `[...]`.

    Each step begins anew, because a given prediction does not correct what rounding has changed.

    Raises:
        NotSampledError: the steps do not lead to the recorded latents.
    """
    latents = run.window.records.latent.float()
    for step, target in enumerate(run.window.records.target.float()):
        run.begin_at(step)
        run.step(step, target[None])
        if step + 1 < len(latents):
            check_follows(run.batch(step + 1).latent[0], latents[step], latents[step + 1], run.rounding)
    return run.latents[0]


def check_follows(found: Tensor, before: Tensor, after: Tensor, rounding: float) -> None:
    """Check that a step's result is the recorded one, up to rounding.

    Raises:
        NotSampledError: it is another.
    """
    if (found - after).norm() > SAME_STEP * (after - before).norm() + 2 * rounding * after.norm():
        raise NotSampledError(
            "the recorded targets do not lead to the recorded latents: the scheduler draws noise, or the pipeline "
            "changes the latents between steps"
        )


def check_supported(dataset: Dataset) -> None:
    """
    Raises:
        NotSampledError: the records are not those of whole sampling runs of one denoiser.
    """
    config, layout = dataset.plan.config, dataset.info.teacher.layout
    if config["trajectory"] != "guided":
        raise NotSampledError(f"trajectory={config['trajectory']} records no sampling runs")
    if config["num_recorded_steps"] is not None:
        raise NotSampledError(f"num_recorded_steps={config['num_recorded_steps']} leaves steps out")
    if len(layout.denoisers) > 1:
        raise NotSampledError(
            f"the steps are shared by {' and '.join(layout.denoisers)}, and this run trains one of them"
        )
    if len(layout.target_channels) > 1:
        raise NotSampledError(f"the denoiser predicts {len(layout.target_channels)} streams, each with a scheduler")


def choose(samples: list[SelectedSample], scale_range: Range) -> list[list[int]]:
    """The trajectories nearest to a third of the trained scales, and to two thirds; at most `EACH` of each."""
    scales = {sample.row["trajectory"]: sample.row["scale"] for sample in samples if sample.row["scale"] != 1}
    low, high = scale_range
    halves = [s for s in scales if scales[s] <= (low + high) / 2], [s for s in scales if scales[s] > (low + high) / 2]
    chosen = []
    for half, third in zip(halves, (1, 2), strict=True):
        wanted = low + (high - low) * third / 3
        nearest = sorted(half, key=lambda index: (abs(scales[index] - wanted), index))[:EACH]
        chosen.append(sorted(nearest, key=lambda index: scales[index]))
    return [near for near in chosen if near]


def whole_trajectory(dataset: Dataset, index: int, skip_damaged: bool) -> Window:
    """Read all parts of a trajectory."""
    rows = dataset.manifest.filter(pc.field("trajectory") == index).sort_by("key").to_pylist()
    return load(dataset, [SelectedSample(row) for row in rows], skip_damaged)
