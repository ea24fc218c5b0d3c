"""A study: datasets, adapters and evaluations that a file names, and its claims, judged by what was measured.

python -m pipeline.study configs/study/claims.yaml output_dir=runs/claims

The same command again goes on where an interrupted one stopped.
"""

from __future__ import annotations

from pipeline.command import run
from stages.study.study import Study, StudyConfig


def main(config: StudyConfig) -> None:
    Study(config).run()


if __name__ == "__main__":
    run(StudyConfig, main, __doc__, argument="study")
