"""Study: make the datasets, adapters and evaluations that a file names, and judge its claims by the results.

python -m pipeline.study configs/study/claims.yaml output_dir=runs/claims

It writes claims.json, claims.md and claims.html. Interrupted, the same command continues.
"""

from __future__ import annotations

from pipeline.command import run
from stages.study.study import Study, StudyConfig


def main(config: StudyConfig) -> None:
    Study(config).run()


if __name__ == "__main__":
    run(StudyConfig, main, __doc__, argument="study")
