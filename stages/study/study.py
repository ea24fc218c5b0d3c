"""A study: make the datasets, adapters and evaluations that a file names, then judge the file's claims.

    python -m pipeline.study configs/study/claims.yaml

The same command again continues an interrupted study, because each command that it runs continues its own work.
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

from stages.adapters.folder import CONFIG_FILE
from stages.configuration.options import check_bounds, option
from stages.errors import UserError
from stages.storage.files import make_folder, write_json
from stages.storage.locks import exclusive_lock
from stages.study.claims import judge
from stages.study.claims_table import Claim, to_text
from stages.study.plan import PlannedRun, StudyPlan, StudyStep
from stages.study.report import REPORTS, write_study_report
from stages.study.subprocess_run import run_command

RESULTS = "claims.json"


@dataclass
class StudyConfig:
    study: str = option(MISSING, "the study's file: datasets, adapters, evaluations and claims, by name")
    output_dir: str = option("runs/claims", "folder for everything that the study makes")
    jobs: int = option(os.cpu_count() or 1, "commands to run in parallel", at_least=1)


class Study:
    """Runs a study's file.

    Raises:
        UsageError: the file is invalid; nothing was started.
        UserError: a command failed; everything that does not depend on it was made first.
    """

    def __init__(self, config: StudyConfig) -> None:
        check_bounds(config)
        self.config, self.root = config, Path(config.output_dir)
        self.plan = StudyPlan(config.study, self.root)
        self.seconds: dict[str, float] = {}
        self.started: list[Popen[bytes]] = []

    def run(self) -> list[Claim]:
        with exclusive_lock(self.root, "another study is running"):
            make_folder(self.root / "logs")
            for name in (RESULTS, *REPORTS):  # of an earlier plan, perhaps
                (self.root / name).unlink(missing_ok=True)
            if failed := self._make_all():
                way_out = "fix that and repeat the command: it makes what is missing"
                raise UserError(f"{next(iter(failed.values()))}; {way_out}")
            return self._judge()

    def _make_all(self) -> dict[Path, str]:
        """Make every folder; return why one was not made, by folder."""
        failed: dict[Path, str] = {}
        for kind, steps in self.plan.steps.items():
            start = time.monotonic()
            skipped = [step for step in steps if failed.keys() & step.needs]
            runnable = [step for step in steps if step not in skipped]
            jobs = 1 if kind == "datasets" else self.config.jobs  # generation starts workers of its own
            lines = dict(zip((step.output for step in runnable), self._run_steps(runnable, jobs), strict=True))
            failed |= {output: line for output, line in lines.items() if line}
            for step in skipped:
                failed[step.output] = f"{step}: skipped, because a command that it needs failed"
                print(failed[step.output], flush=True)
            self.seconds[kind] = time.monotonic() - start
        return failed

    def _run_steps(self, steps: list[StudyStep], jobs: int) -> Iterator[str]:
        """Run the steps and yield why each failed, or an empty string; an interruption terminates the running ones."""
        with ThreadPoolExecutor(jobs) as threads:
            try:
                yield from threads.map(self._run_step, steps)
            except BaseException:
                for process in self.started:
                    process.terminate()
                raise

    def _run_step(self, step: StudyStep) -> str:
        log = self.root / "logs" / f"{step.command}-{step.name}.log"
        result = run_command(step.command, step.overrides, log, Path.cwd(), self.started.append, OMP_NUM_THREADS="1")
        print(f"{step}: {result.last_line}", flush=True)
        return "" if result.succeeded else f"{step}: {result.last_line} (log: {log})"

    def _judge(self) -> list[Claim]:
        rows = list(self.rows())
        claims = judge(self.plan.file.claims, rows)
        metadata = {"study": self.config.study, "seconds": self.seconds}
        write_json(self.root / RESULTS, metadata | {"claims": [claim._asdict() for claim in claims], "rows": rows})
        report = write_study_report(self.root, rows, claims, metadata)
        print("\n".join([*filter(None, [to_text(claims)]), f"report: {report}"]))
        return claims

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row of every evaluation, with the cost of its adapter."""
        made = {run.folder.name: run for adapter in self.plan.file.adapters for run in self.plan.runs(adapter)}
        for step in self.plan.steps["evaluations"]:
            for row in json.loads((step.output / "evaluation.json").read_bytes())["rows"]:
                run = made.get(row["adapter"])
                row |= {"evaluation": step.name, "name": run and run.name, "seed": run and run.seed, "share": None}
                yield row | (cost(run) if run else {})


def cost(run: PlannedRun) -> dict[str, Any]:
    """The cost of an adapter: evaluations of the teacher, and training.

    The dataset may have grown since the training, so the trajectories that were trained on count.
    """
    training = json.loads((run.folder / "training.json").read_bytes())
    generation = json.loads((run.data / "generation.json").read_bytes())
    trained_on = json.loads((run.folder / CONFIG_FILE).read_bytes())["training"]["trajectories"]
    return {
        "data": run.data.name,
        "teacher_evaluations": generation["teacher_evaluations"] // generation["trajectories"] * trained_on,
        "training_seconds": training["seconds"],
        "training_peak_memory_bytes": training["peak_memory_bytes"],
        "parameters": training["adapter_parameters"],
        "share": training["adapter_share"],
    }
