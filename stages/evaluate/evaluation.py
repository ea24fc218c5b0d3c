"""One evaluation: sample every setting batch by batch, and keep only sums."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from stages.base import choose_device
from stages.config import check_bounds
from stages.errors import UserError
from stages.evaluate.comparisons import (
    CFG,
    NONE,
    ONE_PASS,
    Setting,
    arguments_of,
    conditions_of,
    load_pair,
    sample_setting,
    settings,
)
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.metrics import Reference
from stages.progress import progress
from stages.prompts import read_prompts
from stages.sampling import Condition, Request, decode, takes_class_labels

SHOWN = 10


class Evaluation:
    """Compare one pass with two passes and with none.

    Attributes:
        errors: squared distance of the final latents from those of CFG at the same scale: of one pass, and, kept under the
            setting of CFG, of no guidance: the gap that one pass is to close.
        rows: one per setting, as `evaluation.json` holds them, once `run` has ended.
        shown: the first images of each setting `[10, c, h, w]` in [-1, 1], from the same noise.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        check_bounds(config)
        self.config = config
        self.settings = settings(config.guidance_scale)
        device = choose_device(config.device)
        self.reference = Reference(config.reference, device)
        self.pipe, self.adapter = load_pair(config.adapter_dir, config.pretrained_model_name_or_path, device)
        self.arguments = arguments_of(self.pipe, self.adapter)
        self.conditions = self._read_conditions()
        self.measures = {setting: self.reference.measure() for setting in self.settings}
        self.evaluations: Counter[Setting] = Counter()
        self.seconds: dict[Setting, float] = dict.fromkeys(self.settings, 0.0)
        self.errors: dict[Setting, float] = dict.fromkeys(self.settings, 0.0)
        self.shown: dict[Setting, Tensor] = {}
        self.rows: list[dict[str, Any]] = []

    def _read_conditions(self) -> list[Condition]:
        """Classes, or prompts that tell the class that their image is of, so that it can be judged."""
        if self.config.prompts is None or takes_class_labels(type(self.pipe)):
            return conditions_of(self.pipe, self.adapter, None, [self.config.prompts] if self.config.prompts else [])
        prompts = read_prompts(self.config.prompts)
        if not all("class_label" in prompt for prompt in prompts):
            raise UserError(f"prompts={self.config.prompts}: a column class_label must tell what each image is of")
        return prompts

    def run(self) -> list[dict[str, Any]]:
        total = self.config.num_samples
        self._sample(range(min(total, 2)))  # a first call is slower than the rest: it is not timed
        with progress(total * len(self.settings), "evaluate", "images") as bar:
            for start in range(0, total, self.config.batch_size):
                indices = range(start, min(start + self.config.batch_size, total))
                self._add(indices, self._sample(indices, bar))
        self.rows = [self._row(setting) for setting in self.settings]
        return self.rows

    def _of(self, indices: range) -> list[Condition]:
        return [self.conditions[i % len(self.conditions)] for i in indices]

    def _sample(self, indices: range, bar: Any = None) -> dict[Setting, Any]:
        """Every setting on the same batch, one right after the other, so that their times compare."""
        seeds = [(self.config.seed << 32) + i for i in indices]
        request = Request(self._of(indices), seeds, self.config.num_inference_steps, self.arguments)
        samples = {}
        for setting in self.settings:
            samples[setting] = sample_setting(self.pipe, self.adapter, setting, request)
            if bar is not None:
                bar.update(len(indices))
        return samples

    def _add(self, indices: range, samples: dict[Setting, Any]) -> None:
        plain = samples[Setting(NONE, 1.0)].latents
        for setting, result in samples.items():
            if setting.method != NONE:
                guided = samples[Setting(CFG, setting.guidance_scale)].latents
                compared = plain if setting.method == CFG else result.latents
                self.errors[setting] += float((compared - guided).double().square().sum())
            self.evaluations[setting] += result.denoiser_evaluations
            self.seconds[setting] += result.seconds
            images = decode(self.pipe, result.latents)
            self.measures[setting].update(images, self._of(indices))
            self.shown.setdefault(setting, images[:SHOWN].cpu())

    def _row(self, setting: Setting) -> dict[str, Any]:
        total, guided = self.config.num_samples, Setting(CFG, setting.guidance_scale)
        gap = {NONE: 0.0, CFG: 1.0}.get(setting.method)
        if setting.method == ONE_PASS:
            gap = 1 - self.errors[setting] / self.errors[guided]
        return {
            "method": setting.method,
            "guidance_scale": setting.guidance_scale,
            **self.measures[setting].compute(),
            "gap_closed": gap,
            "denoiser_evaluations": self.evaluations[setting] / total,
            "seconds_per_image": self.seconds[setting] / total,
            "time_relative_to_none": self.seconds[setting] / self.seconds[Setting(NONE, 1.0)],
        }
