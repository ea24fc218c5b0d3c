"""A study: the datasets, adapters and evaluations that a file names, made by the commands; then its claims, judged by the rows.

    python -m pipeline.evaluate suite=configs/evaluate/claims.yaml

Repeating the command goes on where it was: each command that it runs knows what it has done.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from omegaconf import MISSING

from pipeline.child import run_child
from pipeline.command import parse
from stages.config import check_bounds, option
from stages.errors import UsageError, UserError
from stages.evaluate.claims import Claim, judge
from stages.evaluate.study_report import table_of_claims, write_study_report
from stages.records.storage import make_folder, write_json

Step = Callable[[], str]


@dataclass
class AdapterPlan:
    data: str = option(MISSING, "the dataset that it is trained on")
    words: list[str] = option(MISSING, "of pipeline.train")
    seeds: list[int] | None = option(None, "one run each; by default the study's")


@dataclass
class EvaluationPlan:
    adapters: list[str] = option(MISSING, "all runs of each are compared")
    words: list[str] = option(MISSING, "of pipeline.evaluate")


@dataclass
class StudyConfig:
    suite: str = option(MISSING, "the study's file: datasets, adapters and evaluations by name")
    output_dir: str = option("runs/claims", "folder of everything the study makes")
    jobs: int = option(os.cpu_count() or 1, "commands that run side by side", at_least=1)


@dataclass
class StudyFile:
    """What a study's file holds, by the names of what is made."""

    seeds: list[int] = option(MISSING, "of the adapters that name none")
    datasets: dict[str, list[str]] = option(MISSING, "words of pipeline.generate")
    adapters: dict[str, AdapterPlan] = option(MISSING, "each with its dataset and words of pipeline.train")
    evaluations: dict[str, EvaluationPlan] = option(MISSING, "each with its adapters and words of pipeline.evaluate")


class Study:
    """Runs what a study's file names.

    Raises:
        UserError: the file is not understood, or a command failed; then all that does not need it is done first.
    """

    def __init__(self, config: StudyConfig) -> None:
        check_bounds(config)
        self.config, self.root = config, Path(config.output_dir)
        self.plan = parse(StudyFile, ["--config", config.suite])
        for name, adapter in self.plan.adapters.items():
            self._known("datasets", adapter.data, f"adapters.{name}.data")
        for name, evaluation in self.plan.evaluations.items():
            for adapter_name in evaluation.adapters:
                self._known("adapters", adapter_name, f"evaluations.{name}.adapters")
        self.seconds: dict[str, float] = {}
        self.started: list[Popen[bytes]] = []

    def _known(self, kind: str, name: str, key: str) -> None:
        if name not in getattr(self.plan, kind):
            raise UsageError(f"{self.config.suite}: {key}: {name}: not among the {kind}")

    def run(self) -> list[Claim]:
        make_folder(self.root / "logs")
        for kind, steps, jobs in (
            ("datasets", self._datasets(), 1),  # each has workers of its own
            ("adapters", self._adapters(), self.config.jobs),
            ("evaluations", self._evaluations(), self.config.jobs),
        ):
            start = time.monotonic()
            failed = [line for line in self._run(steps, jobs) if line]
            self.seconds[kind] = time.monotonic() - start
            if failed:
                raise UserError(f"{failed[0]}; the same command again goes on")
        rows = list(self.rows())
        claims = judge(rows)
        about = {"suite": self.config.suite, "seconds": self.seconds}
        write_json(self.root / "claims.json", about | {"claims": [claim._asdict() for claim in claims], "rows": rows})
        report = write_study_report(self.root, rows, claims, about)
        print(f"{table_of_claims(claims)}\nreport: {report}")
        return claims

    def _run(self, steps: Iterator[Step], jobs: int) -> Iterator[str]:
        """What each step ended with; interrupted, it ends those that run, and begins no other."""
        with ThreadPoolExecutor(jobs) as threads:
            try:
                yield from threads.map(lambda step: step(), steps)
            except BaseException:
                for process in self.started:
                    process.terminate()
                raise

    def _step(self, command: str, name: str, words: list[str]) -> Step:
        def step() -> str:
            log = self.root / "logs" / f"{command}-{name}.log"
            ended = run_child(command, words, log, Path.cwd(), self.started.append, OMP_NUM_THREADS="1")
            print(f"{command} {name}: {ended.line}", flush=True)
            return "" if ended.done else f"{command} {name}: {ended.line} (all of it: {log})"

        return step

    def _datasets(self) -> Iterator[Step]:
        for name, words in self.plan.datasets.items():
            yield self._step("generate", name, [*words, f"output_dir={self.root / 'data' / name}"])

    def runs_of(self, name: str) -> list[tuple[str, int]]:
        """(folder, seed) of each run of an adapter."""
        seeds = self.plan.adapters[name].seeds or self.plan.seeds
        return [(f"{self.root / 'adapters' / name}-{seed}", seed) for seed in seeds]

    def _adapters(self) -> Iterator[Step]:
        for name, adapter in self.plan.adapters.items():
            for folder, seed in self.runs_of(name):
                words = [*adapter.words, f"data_dir={self.root / 'data' / adapter.data}", f"output_dir={folder}"]
                words += [f"seed={seed}", "resume_from_checkpoint=latest", "report_to=none"]
                yield self._step("train", f"{name}-{seed}", words)

    def _evaluations(self) -> Iterator[Step]:
        for name, evaluation in self.plan.evaluations.items():
            folders = [folder for adapter in evaluation.adapters for folder, _ in self.runs_of(adapter)]
            words = [f"adapter_dir=[{','.join(folders)}]", f"output_dir={self.root / 'evaluations' / name}"]
            yield self._step("evaluate", name, [*evaluation.words, *words])

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row of every evaluation, with what its adapter took to make."""
        made = {Path(f).name: (n, seed, Path(f)) for n in self.plan.adapters for f, seed in self.runs_of(n)}
        for evaluation in self.plan.evaluations:
            told = json.loads((self.root / "evaluations" / evaluation / "evaluation.json").read_bytes())
            for row in told["rows"]:
                name, seed, folder = made.get(row["adapter"], (None, None, None))
                row |= {"evaluation": evaluation, "name": name, "seed": seed, "share": None}
                yield row | (self._cost(name, folder) if name and folder else {})

    def _cost(self, name: str, folder: Path) -> dict[str, Any]:
        """What an adapter took: of the teacher, and of training."""
        training = json.loads((folder / "training.json").read_bytes())
        generation = json.loads((self.root / "data" / self.plan.adapters[name].data / "generation.json").read_bytes())
        return {
            "data": self.plan.adapters[name].data,
            "teacher_evaluations": generation["teacher_evaluations"],
            "training_seconds": training["seconds"],
            "training_peak_memory_bytes": training["peak_memory_bytes"],
            "parameters": training["adapter_parameters"],
            "share": training["adapter_share"],
        }


def main(config: StudyConfig) -> None:
    Study(config).run()
