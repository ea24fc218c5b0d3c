"""A study: the datasets, adapters and evaluations that a file names, made by the commands; then its claims, judged by the rows.

    python -m pipeline.study configs/study/claims.yaml

Repeating the command goes on where it was: each command that it runs knows what it has done.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from omegaconf import MISSING

from stages.configuration.options import check_bounds, option
from stages.errors import UserError
from stages.storage.files import make_folder, write_json
from stages.storage.locks import exclusive_lock
from stages.study.claims import Claim, judge
from stages.study.plan import PlannedRun, StudyPlan, StudyStep
from stages.study.report import table_of_claims, write_study_report
from stages.study.subprocess_run import run_child


@dataclass
class StudyConfig:
    study: str = option(MISSING, "the study's file: datasets, adapters and evaluations by name")
    output_dir: str = option("runs/claims", "folder of everything the study makes")
    jobs: int = option(os.cpu_count() or 1, "commands that run side by side", at_least=1)


class Study:
    """Runs what a study's file names.

    Raises:
        UsageError: the file is not understood; then nothing is begun.
        UserError: a command failed; all that does not need it is done first.
    """

    def __init__(self, config: StudyConfig) -> None:
        check_bounds(config)
        self.config, self.root = config, Path(config.output_dir)
        self.plan = StudyPlan(config.study, self.root)
        self.seconds: dict[str, float] = {}
        self.started: list[Popen[bytes]] = []

    def run(self) -> list[Claim]:
        with exclusive_lock(self.root, "another study is being made"):
            make_folder(self.root / "logs")
            if failed := self._make_all():
                way_out = "once that is mended, the same command goes on with what is left"
                raise UserError(f"{next(iter(failed.values()))}; {way_out}")
            return self._judge()

    def _make_all(self) -> dict[Path, str]:
        """Why a folder was not made, of those that were not."""
        failed: dict[Path, str] = {}
        for kind, steps in self.plan.steps.items():
            start = time.monotonic()
            left_out = [step for step in steps if failed.keys() & step.needs]
            able = [step for step in steps if step not in left_out]
            jobs = 1 if kind == "datasets" else self.config.jobs  # a generation has workers of its own
            lines = dict(zip((step.output for step in able), self._lines(able, jobs), strict=True))
            failed |= {output: line for output, line in lines.items() if line}
            for step in left_out:
                failed[step.output] = f"{step}: left out, because what it needs failed"
                print(failed[step.output], flush=True)
            self.seconds[kind] = time.monotonic() - start
        return failed

    def _lines(self, steps: list[StudyStep], jobs: int) -> Iterator[str]:
        """Why each step failed, or nothing; interrupted, it ends those that run, and begins no other."""
        with ThreadPoolExecutor(jobs) as threads:
            try:
                yield from threads.map(self._make, steps)
            except BaseException:
                for process in self.started:
                    process.terminate()
                raise

    def _make(self, step: StudyStep) -> str:
        log = self.root / "logs" / f"{step.command}-{step.name}.log"
        ended = run_child(step.command, step.overrides, log, Path.cwd(), self.started.append, OMP_NUM_THREADS="1")
        print(f"{step}: {ended.line}", flush=True)
        return "" if ended.done else f"{step}: {ended.line} (all of it: {log})"

    def _judge(self) -> list[Claim]:
        rows = list(self.rows())
        claims = judge(rows)
        metadata = {"study": self.config.study, "seconds": self.seconds}
        write_json(
            self.root / "claims.json", metadata | {"claims": [claim._asdict() for claim in claims], "rows": rows}
        )
        report = write_study_report(self.root, rows, claims, metadata)
        print(f"{table_of_claims(claims)}\nreport: {report}")
        return claims

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row of every evaluation, with what its adapter took to make."""
        made = {run.folder.name: run for adapter in self.plan.file.adapters for run in self.plan.runs(adapter)}
        for step in self.plan.steps["evaluations"]:
            for row in json.loads((step.output / "evaluation.json").read_bytes())["rows"]:
                run = made.get(row["adapter"])
                row |= {"evaluation": step.name, "name": run and run.name, "seed": run and run.seed, "share": None}
                yield row | (cost(run) if run else {})


def cost(run: PlannedRun) -> dict[str, Any]:
    """What an adapter took: of the teacher, and of training."""
    training = json.loads((run.folder / "training.json").read_bytes())
    generation = json.loads((run.data / "generation.json").read_bytes())
    return {
        "data": run.data.name,
        "teacher_evaluations": generation["teacher_evaluations"],
        "training_seconds": training["seconds"],
        "training_peak_memory_bytes": training["peak_memory_bytes"],
        "parameters": training["adapter_parameters"],
        "share": training["adapter_share"],
    }
