"""A worker of an evaluation: it samples every setting on a batch of seeds, and measures the images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.adapters import GuidanceAdapter
from stages.base.denoiser import denoiser_of, fingerprint
from stages.base.loading import choose_device, first_line, use_scheduler
from stages.base.pictures import to_picture
from stages.base.sampling import Condition, Request, decode, noise_seeds
from stages.errors import UserError
from stages.evaluate.clip_score import ClipJudge
from stages.evaluate.comparisons import (
    Samples,
    Setting,
    arguments_of,
    fit_to_pipeline,
    load_pair,
    measured_scales,
    sample_setting,
    settings,
)
from stages.evaluate.conditions import read_conditions
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.effective_scale import squared_distances
from stages.evaluate.identity import identity_of
from stages.evaluate.methods import CFG, NONE
from stages.evaluate.metrics import ImageMetrics
from stages.evaluate.parts import LAYOUT, Parts, Result
from stages.evaluate.preference import load_scores
from stages.evaluate.reference import Reference
from stages.evaluate.sizes import check_size
from stages.evaluate.threads import threads_that_pay
from stages.storage.files import whole_file

SHOWN, SHOWN_SIZE = 10, 256
ERROR = "error."  # prefix of the scale of the CFG that the latents are compared with at each step
DISTANCES = "distances"  # between the final latents and those of CFG at each measured scale


@dataclass(frozen=True)
class Facts:
    """Facts about the evaluation that a worker knows once it has loaded.

    Attributes:
        identity: hash of everything that the parts depend on.
        parameters: number of the denoiser's parameters.
        device: the device's name.
    """

    identity: str
    parameters: int
    device: str


class Judge(Protocol):
    """Measures images."""

    @property
    def fingerprint(self) -> str:
        """What its measurements depend on."""

    def measure(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """Measure images `[n, c, h, w]` in [-1, 1]; return values by name with an entry per image `[n, ...]`."""


class Worker:
    """Makes parts of an evaluation; `load` loads everything once."""

    def __init__(self, config: EvaluateConfig, adapters: dict[str, str], output: Path) -> None:
        self.config, self.folders, self.output = config, adapters, output
        self.settings = settings(config.guidance_scale, config.methods, list(adapters))
        self.measured = measured_scales(self.settings)

    def load(self) -> Facts:
        config, device = self.config, choose_device(self.config.device)
        (name, folder), *others = self.folders.items()
        self.pipe, self.first = load_pair(folder, config.pretrained_model_name_or_path, device, config.lora)
        if config.scheduler is not None:
            use_scheduler(self.pipe, config.scheduler, "scheduler")
        self.adapters = {name: self.first}
        for name, folder in others:
            self.adapters[name] = fit_to_pipeline(GuidanceAdapter.from_pretrained(folder), self.pipe)
        self.arguments = arguments_of(self.pipe, self.first)
        self.conditions = read_conditions(config, type(self.pipe), self.first)
        self._check_comparable()
        check_size(self.pipe, self.conditions[0], self.arguments)
        self.judges: list[Judge] = []
        image = self._trial()
        if config.reference is not None:
            metrics = ImageMetrics(Reference(config.reference, device, config.features, config.features_model))
            metrics.check(self.conditions[: config.num_samples])
            metrics.check_size(image)
            self.judges.append(metrics)
        if config.clip_model is not None:
            self.judges.append(ClipJudge(config.clip_model, device))
        self.judges += load_scores(config.preference, device)
        facts = self._facts()
        self.parts = Parts(self.output, facts.identity, number_of_parts(config))
        self.is_warm = False
        return facts

    def _trial(self) -> Tensor:
        """One image `[1, c, h, w]` in two steps, to find out before any work is done what the pipeline makes.

        Raises:
            UserError: the pipeline cannot use the scheduler that was named.
        """
        request = Request(self.conditions[:1], noise_seeds(self.config.seed, [0]), 2, self.arguments)
        try:
            with threads_that_pay(self.pipe):
                return decode(self.pipe, sample_setting(self.pipe, self.first, Setting(NONE, 1.0), request).latents)
        except Exception as error:
            if self.config.scheduler is None or isinstance(error, UserError):
                raise
            raise UserError(
                f"scheduler={self.config.scheduler}: {type(self.pipe).__name__} cannot use it: {first_line(error)}: name "
                "another one, or leave it out"
            ) from error

    def _check_comparable(self) -> None:
        """Check that all adapters were trained for the same base and teacher, because they share the base's samples."""
        for name, adapter in self.adapters.items():
            checks = {
                "base": adapter.metadata.base.denoiser_fingerprint == self.first.metadata.base.denoiser_fingerprint
                or self.config.pretrained_model_name_or_path is not None,
                "teacher": self._teacher_of(adapter) == self._teacher_of(self.first),
                "teacher.call": arguments_of(self.pipe, adapter) == self.arguments,
                "classes": adapter.metadata.sampled["class_labels"] == self.first.metadata.sampled["class_labels"],
            }
            if differing := [name for name, equal in checks.items() if not equal]:
                raise UserError(
                    f"adapter_dir: {name} was trained with another {differing[0]} than {next(iter(self.adapters))}: "
                    "evaluate each in a run of its own"
                )

    @staticmethod
    def _teacher_of(adapter: GuidanceAdapter) -> list[Any]:
        return [adapter.metadata.base.pipeline_class, adapter.metadata.teacher]

    def _facts(self) -> Facts:
        processors = ("feature_extractor", "image_processor")
        components = {
            name: part
            for name, part in self.pipe.components.items()
            if isinstance(part, nn.Module) or (name in processors and part is not None)
        }
        parted = ("num_samples", "num_inference_steps", "batch_size", "seed", "save_images", "features")
        facts = {
            "layout": LAYOUT,
            "config": {key: getattr(self.config, key) for key in parted},
            "settings": [(s.method, s.guidance_scale, s.adapter) for s in self.settings],
            "adapters": {
                name: [fingerprint(a), asdict(a.config), a.metadata.guidance_gain, a.metadata.scale_range]
                for name, a in self.adapters.items()
            },
            "base": {name: identity_of(part) for name, part in components.items()},
            "pipeline": [type(self.pipe).__name__, self.arguments],
            "scheduler": identity_of(self.pipe.scheduler),
            "conditions": self.conditions,
            "judges": [judge.fingerprint for judge in self.judges],
        }
        identity = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        device = torch.cuda.get_device_name(self.pipe.device) if self.pipe.device.type == "cuda" else "cpu"
        return Facts(identity, sum(p.numel() for p in denoiser_of(self.pipe)[1].parameters()), device)

    def make(self, part: int) -> int:
        """Make and write a part; return its number of images per setting."""
        with threads_that_pay(self.pipe):
            return self._make(part)

    def _make(self, part: int) -> int:
        start = part * self.config.batch_size
        indices = range(start, min(start + self.config.batch_size, self.config.num_samples))
        if not self.is_warm:
            self._sample(indices[:2])  # the first call is slower, so it is not timed
            self.is_warm = True
        samples, errors = self._sample(indices)
        measured = [samples[self.measured[scale]].latents for scale in sorted(self.measured)]
        results = []
        for setting, result in samples.items():
            images = decode(self.pipe, result.latents)
            values = {
                name: value
                for judge in self.judges
                for name, value in judge.measure(images, self._conditions_at(indices)).items()
            }
            values[DISTANCES] = squared_distances(result.latents, measured).cpu()
            shown = shrunk(images[: max(0, SHOWN - start)])
            cost = result.denoiser_evaluations, result.seconds, result.fused
            results.append(Result(values | errors[setting], shown, *cost))
            if self.config.save_images:
                self._save(setting, indices, images)
        self.parts.write(part, self.timesteps, results)
        return len(indices)

    def _conditions_at(self, indices: range) -> list[Condition]:
        return [self.conditions[i % len(self.conditions)] for i in indices]

    def _sample(self, indices: range) -> tuple[dict[Setting, Samples], dict[Setting, dict[str, Tensor]]]:
        """Sample every setting on one batch, one after another so that times compare; measure the distances to CFG.

        Keep intermediate latents for the unguided run and the current CFG run only.
        """
        seeds = noise_seeds(self.config.seed, indices)
        request = Request(self._conditions_at(indices), seeds, self.config.num_inference_steps, self.arguments)
        samples: dict[Setting, Samples] = {}
        errors: dict[Setting, dict[str, Tensor]] = {setting: {} for setting in self.settings}
        for setting in self.settings:
            adapter = self.adapters.get(setting.adapter or "", self.first)
            found = sample_setting(self.pipe, adapter, setting, request)
            check_finite(found.latents, setting)
            name = f"{ERROR}{setting.guidance_scale!r}"
            if setting.method == NONE:
                plain, self.timesteps = found, [float(step.timestep) for step in found.steps]
            elif setting.method == CFG:
                guided = found
                errors[Setting(NONE, 1.0)][name] = squared_errors(plain, guided)
            else:
                errors[setting][name] = squared_errors(found, guided)
            samples[setting] = replace(found, steps=[])
        return samples, errors

    def _save(self, setting: Setting, indices: range, images: Tensor) -> None:
        folder = self.output / "images" / folder_name(setting, len(self.adapters) > 1)
        for i, image in zip(indices, images, strict=True):
            with whole_file(folder / f"{i:05d}.png") as file:
                to_picture(image).save(file, format="png")


def check_finite(latents: Tensor, setting: Setting) -> None:
    """
    Raises:
        UserError: some of the final latents are not finite.
    """
    if not latents.isfinite().all():
        raise UserError(
            f"guidance_scale={setting.guidance_scale:g}: {setting.method} makes latents that are not finite: name another "
            "scale, scheduler or number of steps"
        )


def number_of_parts(config: EvaluateConfig) -> int:
    return -(-config.num_samples // config.batch_size)


def folder_name(setting: Setting, several: bool) -> str:
    """A name such as `one_pass-2`, or `one_pass-2-NAME` if there are several adapters."""
    name = f"{setting.method}-{repr(setting.guidance_scale).removesuffix('.0')}"
    return f"{name}-{setting.adapter.replace('/', '_')}" if several and setting.adapter else name


def squared_errors(one: Samples, other: Samples) -> Tensor:
    """Mean squared distances `[n, steps]` between the latents of n images at each step."""
    pairs = [(a.latents, b.latents) for a, b in zip(one.steps, other.steps, strict=True)]
    return torch.stack([(a - b).double().square().flatten(1).mean(dim=1) for a, b in pairs], dim=1).cpu()


def shrunk(images: Tensor) -> Tensor:
    """Images `[n, c, h, w]` in [-1, 1] as bytes for the report, with a longer side of at most 256."""
    factor = SHOWN_SIZE / max(images.shape[2:])
    if factor < 1 and len(images):
        images = functional.interpolate(images, scale_factor=factor, mode="area")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
