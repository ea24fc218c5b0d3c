"""Adapters against CFG, CFG on the first steps alone, and no guidance -> table, plots, report.

python -m pipeline.evaluate adapter_dir=runs/mnist_dit guidance_scale=[1.5,2,3]
python -m pipeline.evaluate adapter_dir=[runs/lora,runs/offset] output_dir=runs/compared

The same command again goes on where an interrupted one stopped. Several GPUs share the work through Ray, several cores by processes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.command import run
from stages.adapters import GuidanceAdapter
from stages.adapters.folder import write_card
from stages.base.loading import has_several_gpus
from stages.configuration.options import to_yaml
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Evaluation, Makers
from stages.evaluate.processes import over_cores
from stages.evaluate.report import table, write_report
from stages.storage.files import whole_file, write_json


def main(config: EvaluateConfig) -> None:
    evaluation = evaluate(config)
    print(table(evaluation.rows))
    print(f"report: {evaluation.folder / 'report.html'}")


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate, and write all that a person or a program reads of it into the evaluation's folder."""
    evaluation = Evaluation(config)
    rows = evaluation.run(makers(config))
    with whole_file(evaluation.folder / "config.yaml") as file:
        file.write(to_yaml(config).encode())
    write_json(evaluation.folder / "evaluation.json", {**evaluation.metadata, "rows": rows})
    write_report(evaluation.folder, rows, evaluation.shown, evaluation.metadata)
    as_trained = config.lora is None and config.scheduler is None and config.pretrained_model_name_or_path is None
    if config.output_dir is None and as_trained and "frechet_distance" in rows[0]:
        write_results_to_card(Path(config.adapter_dir), rows)
    return evaluation


def makers(config: EvaluateConfig) -> Makers:
    """Several GPUs make the parts through Ray, where there are several, else this machine's cores do."""
    if has_several_gpus() and config.device in ("auto", "cuda"):
        from stages.evaluate.fleet import evaluate_over_ray  # imports Ray

        return evaluate_over_ray
    return over_cores


def write_results_to_card(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Tell the rows in the model card of an adapter's folder, its curves apart."""
    if folder.is_dir():
        adapter = GuidanceAdapter.from_pretrained(folder)
        evaluation = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows]
        adapter.metadata = replace(adapter.metadata, evaluation=evaluation)
        write_card(adapter, folder)


if __name__ == "__main__":
    run(EvaluateConfig, main, __doc__)
