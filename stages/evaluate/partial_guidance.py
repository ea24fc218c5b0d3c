"""CFG at some steps or for some images only, at the cost of just these unconditional predictions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from stages.adapters.metadata import AdapterMetadata
from stages.base.denoiser import bind_inputs, denoisers_of, latent_name, samples_in
from stages.base.hooks import SchedulerStep
from stages.base.patching import patched
from stages.errors import UserError
from stages.evaluate.rules import Place, Rule

Forward = Callable[..., Any]


@contextmanager
def partly_guided(
    pipe: Any, metadata: AdapterMetadata, method: str, rule: Rule, steps: list[SchedulerStep], n: int
) -> Iterator[None]:
    """Within the context, the pipeline guides the steps and images that a rule names; the others cost one pass.

    For these, the denoiser runs the conditional part only, and the pipeline receives it as the unconditional part, too:
    `u + w (c - u) = c` for any `w`, and rules that rescale or project the difference return `c` as well. If the rule
    keeps the difference `d = c - u` of the last guided step, the pipeline receives `c - d`.

    Args:
        metadata: of an adapter: where a guided step has its unconditional part, and the timesteps' unit.
        method: its name, for errors.
        steps: the scheduler's steps so far, as `scheduler_steps` lists them.
        n: number of images.

    Raises:
        UserError: the place of the conditional part is unknown, or it runs after the unconditional one.
    """
    check_place(pipe, metadata.unconditional, method)
    sampling = Sampling(pipe, metadata, method, rule, steps, n)
    with ExitStack() as stack:
        for denoiser in denoisers_of(pipe).values():
            stack.enter_context(patched(denoiser, "forward", sampling.run))
        yield


def check_place(pipe: Any, place: dict[str, int] | None, method: str) -> None:
    """
    Raises:
        UserError: a guided step does not make one call with a doubled batch, nor several with the conditional first.
    """
    name, way_out = type(pipe).__name__, f"leave {method} out of methods=[...]"
    if place is None:
        raise UserError(f"{name}: the unconditional part of a guided step is unknown: {way_out}")
    if place["chunks"] > 2:
        raise UserError(f"{name}: a guided step has {place['chunks']} parts, not two: {way_out}")
    if place["chunks"] == 1 and place["call"] == 0:
        raise UserError(f"{name}: a guided step runs its unconditional part first: {way_out}")


class Sampling:
    """The denoiser calls of one sampling.

    Attributes:
        guided: the images that are guided at the current step.
        call: the number of the current call in the current step.
        differences: `c - u` `[n, ...]` at the last guided step, by call and number of the prediction.
    """

    def __init__(
        self, pipe: Any, metadata: AdapterMetadata, method: str, rule: Rule, steps: list[SchedulerStep], n: int
    ) -> None:
        assert metadata.unconditional is not None
        self.pipe, self.metadata, self.method, self.rule = pipe, metadata, method, rule
        self.steps, self.n = steps, n
        self.place = metadata.unconditional
        self.step, self.call = -1, -1
        self.guided: list[int] = []
        self.differences: dict[tuple[int, int], Tensor] = {}
        self.conditional: Any = None  # the output of a step's first call
        self.timesteps: list[int] | None = None  # the number of each step's timestep
        self.different = 0

    def run(self, forward: Forward, denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        """Run what a call of the denoiser needs of its batch, and return an output for the whole batch."""
        self._begin_call(denoiser, args, kwargs)
        size, chunks = samples_in(denoiser, args, kwargs), self.place["chunks"]
        if size not in (self.n, chunks * self.n):
            raise UserError(
                f"{type(self.pipe).__name__}: its denoiser gets {size} samples for {self.n} images, so the unconditional "
                f"ones are unknown: leave {self.method} out of methods=[...]"
            )
        if chunks == 1:
            return self._of_calls(forward, denoiser, args, kwargs)
        if size == self.n:  # the pipeline itself does not guide at this step
            return forward(*args, **kwargs)
        return self._of_chunks(forward, denoiser, args, kwargs)

    def _begin_call(self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call += 1
        if self.step != len(self.steps):
            self.step, self.call = len(self.steps), 0
            wanted = self.rule.guided(self._place(denoiser, args, kwargs), self.n)
            self.guided = [image for image, is_guided in enumerate(wanted) if is_guided]

    def _place(self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place:
        """The place of the current step. A pipeline that begins with a picture leaves out the first timesteps."""
        timesteps = self.pipe.scheduler.timesteps
        if self.timesteps is None:
            given = torch.as_tensor(bind_inputs(denoiser, args, kwargs)[self.metadata.timestep]).float().max().cpu()
            counted = timesteps.float().cpu()
            own = counted * self.metadata.timestep_scale + self.metadata.timestep_offset
            distances = (own - given).abs()
            begin = int((distances == distances.min()).nonzero()[-1])
            number = torch.cat([counted.new_zeros(1), (counted.diff() != 0).float()]).cumsum(0).int().tolist()
            self.timesteps = number[begin:]
            self.different = number[-1] + 1
        current = self.timesteps[min(self.step, len(self.timesteps) - 1)]
        return Place(self.step, len(self.timesteps), current, self.different)

    @property
    def _all_guided(self) -> bool:
        return len(self.guided) == self.n

    @property
    def _watches(self) -> bool:
        return self.rule.compares or self.rule.keeps_difference

    def _of_calls(self, forward: Forward, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step's first call is conditional; the later ones run for the guided images only."""
        if self.call == 0:
            output = forward(*args, **kwargs)
            keep = self._watches or not self._all_guided
            self.conditional = copy.deepcopy(output) if keep else None  # pipelines may modify it in place
            return output
        computed: list[Tensor] = []
        if self.guided:
            rows = slice(0, self.n) if self._all_guided else self.guided
            output = forward(*select_rows(args, self.n, rows), **select_rows(kwargs, self.n, rows))
            computed = predictions_in(output, len(self.guided))
            if self._all_guided and not self._watches:
                return output
        latents = latents_of(denoiser, args, kwargs) if self.rule.compares else None
        pieces = [
            self._unconditional(i, c, computed[i] if computed else None, latents)
            for i, c in enumerate(predictions_in(self.conditional, self.n))
        ]
        return with_predictions(self.conditional, self.n, pieces)

    def _of_chunks(self, forward: Forward, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step's one call has a doubled batch: run the conditional half, and of the other the guided images."""
        n, is_last = self.n, self.place["chunk"] == 1
        conditional = list(range(n)) if is_last else list(range(n, 2 * n))
        rows = sorted([*conditional, *(self.place["chunk"] * n + image for image in self.guided)])
        taken: slice | list[int] = rows if self.guided else slice(conditional[0], conditional[-1] + 1)
        if self._all_guided:
            taken = slice(0, 2 * n)
        output = forward(*select_rows(args, 2 * n, taken), **select_rows(kwargs, 2 * n, taken))
        if self._all_guided and not self._watches:
            return output
        begin = 0 if is_last else len(self.guided)
        own = slice(begin, begin + n)
        others = slice(n, len(rows)) if is_last else slice(0, begin)
        latents, pieces = latents_of(denoiser, args, kwargs)[conditional] if self.rule.compares else None, []
        for i, prediction in enumerate(predictions_in(output, len(rows))):
            c = prediction[own]
            u = self._unconditional(i, c, prediction[others] if self.guided else None, latents)
            pieces.append(torch.cat([c, u] if is_last else [u, c]))
        return with_predictions(output, len(rows), pieces)

    def _unconditional(self, number: int, c: Tensor, computed: Tensor | None, latents: Tensor | None) -> Tensor:
        """The unconditional prediction `[n, ...]` that the pipeline receives.

        Args:
            number: of the prediction in the denoiser's output.
            c: `[n, ...]`.
            computed: `[k, ...]`, of the k guided images; None if there are none.
            latents: `[n, ...]`; None if the rule does not compare.
        """
        key = self.call, number
        if computed is None:
            return c - self.differences[key] if key in self.differences else c.clone()
        if latents is not None and number == 0 and self.call == self.place["call"]:
            seen = self._of_one_shape(latents[self.guided], c[self.guided], computed)
            self.rule.see(seen[0], seen[1], seen[2], self.guided)
        if self.rule.keeps_difference:
            self.differences[key] = c - computed
        if self._all_guided:
            return computed
        u = c.clone()
        u[self.guided] = computed
        return u

    def _of_one_shape(self, latents: Tensor, *predictions: Tensor) -> tuple[Tensor, ...]:
        """Latents and predictions of one shape: without a learned variance, and without a picture beside the latents.

        Raises:
            UserError: they differ in more than the number of channels.
        """
        channels = min(latents.shape[1], predictions[0].shape[1])
        parts = tuple(each[:, :channels] for each in (latents, *predictions))
        if parts[0].shape != parts[1].shape:
            raise UserError(
                f"{type(self.pipe).__name__}: its predictions have another shape than its latents, so their agreement "
                f"is unknown: leave {self.method} out of methods=[...]"
            )
        return parts


def latents_of(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The latents `[rows, ...]` of a call."""
    given = args[0] if args else kwargs[latent_name(denoiser)]
    return given if isinstance(given, Tensor) else torch.stack(list(given))


def select_rows(given: Any, size: int, rows: slice | list[int]) -> Any:
    """Arguments in which every tensor of `size` rows, and every list of one entry per row, has the given rows only."""
    match given:
        case _ if rows == slice(0, size):
            return given
        case Tensor():
            return given[rows] if has_rows(given, size) else given
        case dict():
            return {name: select_rows(value, size, rows) for name, value in given.items()}
        case list() if len(given) == size and not all(has_rows(entry, size) for entry in given):
            return [given[row] for row in (range(size)[rows] if isinstance(rows, slice) else rows)]
        case tuple() | list():
            return type(given)(select_rows(value, size, rows) for value in given)
    return given


def has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def predictions_in(output: Any, rows: int) -> list[Tensor]:
    """The tensors `[rows, ...]` in a denoiser's output; a list of one tensor per row is stacked."""
    match output:
        case Tensor():
            return [output] if has_rows(output, rows) else []
        case list() if is_listed(output, rows):
            return [torch.stack(output)]
        case dict() | tuple() | list():
            values = output.values() if isinstance(output, dict) else output
            return [prediction for value in values for prediction in predictions_in(value, rows)]
    return []


def with_predictions(output: Any, rows: int, predictions: list[Tensor]) -> Any:
    """An output in which others take the place of the tensors that `predictions_in` finds, in the same order."""
    left = iter(predictions)

    def replaced(part: Any) -> Any:
        match part:
            case Tensor():
                return next(left) if has_rows(part, rows) else part
            case list() if is_listed(part, rows):
                return list(next(left).unbind(0))
            case dict():
                return type(part)(**{name: replaced(value) for name, value in part.items()})
            case tuple() | list():
                return type(part)(replaced(value) for value in part)
        return part

    return replaced(output)


def is_listed(value: list[Any], rows: int) -> bool:
    """Whether a list holds one tensor per row."""
    tensors = all(isinstance(entry, Tensor) for entry in value)
    return len(value) == rows and tensors and not all(has_rows(entry, rows) for entry in value)
