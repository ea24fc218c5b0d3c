"""The plan of a study: its file, checked as a whole before anything starts, and the steps that it takes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING

from stages.base.loading import resolve
from stages.base.prompts import read_prompts
from stages.configuration.options import check_bounds, option
from stages.configuration.parsing import parse
from stages.errors import UsageError, UserError
from stages.evaluate.comparisons import settings
from stages.evaluate.config import EvaluateConfig
from stages.generate.config import GenerateConfig
from stages.generate.plan import check as check_generate_config
from stages.study.claims import ClaimPlan, check_arguments
from stages.train.config import TrainConfig
from stages.train.trainer import check as check_training

NAME = re.compile(r"\w[\w.-]*")


def check_generation(config: GenerateConfig) -> None:
    check_generate_config(config)
    check_prompts(config.prompts)


def check_evaluation(config: EvaluateConfig) -> None:
    check_bounds(config)
    settings(config.guidance_scale, config.methods)
    check_prompts(config.prompts)
    if config.reference is not None and not Path(resolve(config.reference)).is_dir():
        raise UserError(f"reference={config.reference}: no such folder: name a folder of real images, or null")
    for entry in config.preference:
        package = entry.partition(":")[0].partition(".")[0]
        if not package or importlib.util.find_spec(package) is None:
            raise UserError(f"preference={entry}: no module {package or entry} is found: name it as MODULE:NAME")


def check_prompts(prompts: str | None) -> None:
    if prompts is not None:
        read_prompts(prompts)


# What each command would refuse only once it runs, hours into the study.
CHECKS: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "generate": (GenerateConfig, check_generation),
    "train": (TrainConfig, check_training),
    "evaluate": (EvaluateConfig, check_evaluation),
}


@dataclass
class AdapterPlan:
    data: str = option(MISSING, "the dataset to train on")
    overrides: list[str] = option(MISSING, "overrides of pipeline.train")
    seeds: list[int] | None = option(None, "one training each; by default the study's")


@dataclass
class EvaluationPlan:
    adapters: list[str] = option(MISSING, "the evaluation compares every seed of each")
    overrides: list[str] = option(MISSING, "overrides of pipeline.evaluate")


@dataclass
class StudyFile:
    """The content of a study's file."""

    seeds: list[int] = option(MISSING, "seeds of the adapters that name none")
    datasets: dict[str, list[str]] = option(MISSING, "overrides of pipeline.generate, by dataset")
    adapters: dict[str, AdapterPlan] = option(MISSING, "adapters to train, by name")
    evaluations: dict[str, EvaluationPlan] = option(MISSING, "evaluations to run, by name")
    claims: dict[str, ClaimPlan] = option(dict, "claims to judge by the evaluations, by name")


class StudyStep(NamedTuple):
    """One command of a study, the folder that it makes, and the folders that it needs."""

    command: str
    name: str
    overrides: list[str]
    output: Path
    needs: list[Path]

    def __str__(self) -> str:
        return f"{self.command} {self.name}"


class PlannedRun(NamedTuple):
    """One training of an adapter, with one seed."""

    name: str
    seed: int
    data: Path
    folder: Path


class StudyPlan:
    """The steps of a study, by kind, in the order in which they run.

    Args:
        study: path of the study's file.
        root: folder for everything that the steps make.

    Raises:
        UsageError: the file, or the overrides of one of its commands, are invalid.
    """

    def __init__(self, study: str, root: Path) -> None:
        self.root = root
        try:
            self.file = read_study(study)
            self._check_names()
            self.steps = {
                "datasets": list(self._datasets()),
                "adapters": list(self._adapters()),
                "evaluations": list(self._evaluations()),
            }
            self._check_overrides()
        except UserError as error:
            raise type(error)(f"{study}: {str(error).removeprefix(f'--config {study}: ')}") from error

    def _check_names(self) -> None:
        file = self.file
        for kind in ("datasets", "adapters", "evaluations", "claims"):
            for name in getattr(file, kind):
                if not NAME.fullmatch(name):
                    raise UsageError(f"{kind}: {name}: a name has letters, digits, _, - and . only")
        for name, adapter in file.adapters.items():
            check_each_once(f"adapters.{name}: seeds", self._seeds(name))
            check_among(f"adapters.{name}.data", adapter.data, "datasets", file.datasets)
        for name, evaluation in file.evaluations.items():
            check_each_once(f"evaluations.{name}: adapters", evaluation.adapters)
            for adapter_name in evaluation.adapters:
                check_among(f"evaluations.{name}.adapters", adapter_name, "adapters", file.adapters)
        for name, claim in file.claims.items():
            self._check_claim(f"claims.{name}", claim)

    def _check_claim(self, key: str, claim: ClaimPlan) -> None:
        check_arguments(key, claim)
        check_among(f"{key}.evaluation", claim.evaluation, "evaluations", self.file.evaluations)
        compared = self.file.evaluations[claim.evaluation].adapters
        if claim.home is not None:
            check_among(f"{key}.home", claim.home, "evaluations", self.file.evaluations)
            home = self.file.evaluations[claim.home].adapters
            for adapter in claim.adapters:
                check_among(f"{key}.adapters", adapter, f"adapters of the evaluation {claim.home}", home)
        for name, adapters in (("adapters", claim.adapters), ("against", claim.against)):
            if adapters is not None:
                check_each_once(f"{key}: {name}", adapters)
            for adapter in adapters or ():
                check_among(f"{key}.{name}", adapter, f"adapters of the evaluation {claim.evaluation}", compared)
        for adapter in claim.against or ():
            if adapter in claim.adapters:
                raise UsageError(
                    f"{key}.against: {adapter}: is among the claim's adapters too: remove it from one of them"
                )

    def _check_overrides(self) -> None:
        for step in itertools.chain(*self.steps.values()):
            config, check = CHECKS[step.command]
            try:
                check(parse(config, step.overrides))
            except UserError as error:
                raise type(error)(f"{step}: {error}") from error

    def _seeds(self, adapter: str) -> list[int]:
        own = self.file.adapters[adapter].seeds
        return self.file.seeds if own is None else own

    def runs(self, adapter: str) -> Iterator[PlannedRun]:
        """The trainings of one adapter, one for each seed."""
        data = self.root / "data" / self.file.adapters[adapter].data
        for seed in self._seeds(adapter):
            yield PlannedRun(adapter, seed, data, self.root / "adapters" / f"{adapter}-{seed}")

    def _datasets(self) -> Iterator[StudyStep]:
        for name, overrides in self.file.datasets.items():
            output = self.root / "data" / name
            own = [override("output_dir", str(output))]
            yield StudyStep("generate", name, with_own(f"datasets.{name}", overrides, own), output, [])

    def _adapters(self) -> Iterator[StudyStep]:
        for name, adapter in self.file.adapters.items():
            for run in self.runs(name):
                own = [override("data_dir", str(run.data)), override("output_dir", str(run.folder))]
                own += [f"seed={run.seed}", "resume_from_checkpoint=latest", "report_to=none"]
                overrides = with_own(f"adapters.{name}", adapter.overrides, own)
                yield StudyStep("train", run.folder.name, overrides, run.folder, [run.data])

    def _evaluations(self) -> Iterator[StudyStep]:
        for name, evaluation in self.file.evaluations.items():
            folders = [run.folder for adapter in evaluation.adapters for run in self.runs(adapter)]
            output = self.root / "evaluations" / name
            own = [
                override("adapter_dir", [str(folder) for folder in folders]),
                override("output_dir", str(output)),
            ]
            overrides = with_own(f"evaluations.{name}", evaluation.overrides, own)
            yield StudyStep("evaluate", name, overrides, output, folders)


def read_study(path: str) -> StudyFile:
    """
    Raises:
        UsageError: it is no study's file; a key that it lacks is one to add, not to say on the command line.
    """
    try:
        return parse(StudyFile, ["--config", path])
    except UsageError as error:
        raise UsageError(re.sub(r": say [\w.-]+=\.\.\.$", ": add this key", str(error))) from error


def with_own(key: str, given: list[str], own: list[str]) -> list[str]:
    """A command's overrides: the file's, then the study's own.

    Raises:
        UsageError: the file names an option that is the study's own.
    """
    names = {each.partition("=")[0] for each in own}
    for each in given:
        if (name := each.partition("=")[0]) in names:
            raise UsageError(f"{key}: overrides: {each}: the study sets {name} itself: leave it out")
    return [*given, *own]


def override(key: str, value: Any) -> str:
    """An override `key=value` for a command; the value may contain any character."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def check_each_once(key: str, values: Sequence[Any]) -> None:
    if not values or len(set(values)) < len(values):
        raise UsageError(f"{key}={list(values)}: name at least one, each once")


def check_among(key: str, name: str, kind: str, names: Collection[str]) -> None:
    if name not in names:
        raise UsageError(f"{key}: {name}: not among the {kind}: {', '.join(names) or 'there are none'}")
