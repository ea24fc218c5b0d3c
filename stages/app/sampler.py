"""Pictures of one condition, by any method, with a pipeline and its adapter."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from diffusers import ModularPipeline
from PIL import Image

from stages.adapters import GuidanceAdapter
from stages.base.loading import first_line
from stages.base.pictures import PICTURES, grid, to_picture
from stages.base.sampling import Condition, Request, decode, noise_seeds, takes_class_labels
from stages.errors import UserError
from stages.evaluate.comparisons import Setting, arguments_of, sample_setting
from stages.evaluate.conditions import conditions_of
from stages.evaluate.methods import NONE
from stages.evaluate.threads import threads_that_pay

UNGUIDED_KEPT = 8  # samples; they do not depend on the scale
SMALL, SIDE = 128, 3  # narrower pictures are made nine at once: one alone shows little, and takes mostly overhead
NEGATIVE = "negative_prompt"


@dataclass(frozen=True)
class Subject:
    """What pictures show: a class or a prompt, the seed of their noise, and what they shall not show."""

    shown: int | str
    seed: int
    negative_prompt: str = ""


@dataclass(frozen=True)
class Sample:
    """Pictures as one sheet, and their cost without decoding.

    Attributes:
        denoiser_evaluations: per picture; milliseconds: of all pictures together.
        fused: for one pass, whether the scale was fused into the weights.
    """

    sheet: Image.Image
    denoiser_evaluations: int
    milliseconds: float
    fused: bool | None


class Sampler:
    """Samples pictures of one condition, from any thread: a lock guards the pipeline, which is not thread-safe.

    Args:
        adapter: detached.

    Attributes:
        classes: names and labels of the trained classes; None for a pipeline that takes prompts.
        takes_negative: whether the pipeline takes negative prompts.
        side: pictures in each row and column of a sheet.

    Raises:
        UserError: the pipeline samples neither from a prompt alone nor from a class.
    """

    def __init__(self, pipe: Any, adapter: GuidanceAdapter, num_inference_steps: int) -> None:
        self.pipe, self.adapter, self.num_inference_steps = pipe, adapter, num_inference_steps
        self.classes = class_names(pipe, adapter) if takes_class_labels(type(pipe)) else None
        self.takes_negative = NEGATIVE in inputs_of(pipe)
        self.side = 1
        self._lock = threading.Lock()
        self._unguided = lru_cache(UNGUIDED_KEPT)(self._sample)
        self.side = SIDE if self._warm_up().sheet.width <= SMALL else 1

    def sample(self, setting: Setting, subject: Subject) -> Sample:
        """
        Raises:
            UserError: the pipeline cannot do what is asked for.
        """
        return (self._unguided if setting.method == NONE else self._sample)(setting, subject)

    def _sample(self, setting: Setting, subject: Subject) -> Sample:
        n = self.side**2
        request = Request(
            [self._condition(subject)] * n,
            noise_seeds(subject.seed, range(n)),
            self.num_inference_steps,
            arguments_of(self.pipe, self.adapter),
        )
        with self._lock, threads_that_pay(self.pipe):
            made = sample_setting(self.pipe, self.adapter, setting, request)
            pictures = [to_picture(image) for image in decode(self.pipe, made.latents)]
        sheet = grid([pictures[i : i + self.side] for i in range(0, n, self.side)])
        return Sample(sheet, made.denoiser_evaluations // n, made.seconds * 1000, made.fused)

    def _condition(self, subject: Subject) -> Condition:
        labels, prompts = ([subject.shown], []) if isinstance(subject.shown, int) else (None, [subject.shown])
        (condition,) = conditions_of(type(self.pipe), self.adapter, labels, prompts)
        return condition | ({NEGATIVE: subject.negative_prompt} if subject.negative_prompt else {})

    def _warm_up(self) -> Sample:
        """Sample once: the first call of a pipeline takes longer, and shows whether it can be sampled."""
        kind, taken = type(self.pipe).__name__, [name for name in PICTURES if name in inputs_of(self.pipe)]
        try:
            return self._sample(Setting(NONE, 1.0), Subject(self.classes[0][1] if self.classes else "", seed=0))
        except Exception as error:
            if not taken:
                raise
            raise UserError(
                f"{kind} cannot be sampled from a prompt alone ({first_line(error)}): give it pictures with "
                f"python -m pipeline.sample prompts=... {taken[0]}=..."
            ) from error


def class_names(pipe: Any, adapter: GuidanceAdapter) -> list[tuple[str, int]]:
    """The trained classes by the names that the pipeline has for them, else by their labels."""
    names: dict[int, list[str]] = {}
    for name, label in (getattr(pipe, "labels", None) or {}).items():
        names.setdefault(int(label), []).append(name)
    return [(", ".join(names.get(label, [str(label)])), label) for label in adapter.metadata.sampled["class_labels"]]


def inputs_of(pipe: Any) -> set[str]:
    """The names of the arguments that a pipeline's call takes."""
    if isinstance(pipe, ModularPipeline):  # its call takes what its blocks take
        return {entry.name for entry in pipe.blocks.inputs if entry.name}
    return set(inspect.signature(type(pipe).__call__).parameters)
