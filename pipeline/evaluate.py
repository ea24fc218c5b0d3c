"""Evaluation: adapters -> table, plots and report, next to CFG, CFG at some steps only, and no guidance.

python -m pipeline.evaluate adapter_dir=runs/mnist_dit 'guidance_scale=[1.5,2,3]'
python -m pipeline.evaluate 'adapter_dir=[runs/lora,runs/offset]' output_dir=runs/compared

Interrupted, the same command continues. Several GPUs share the work through Ray, several cores by processes.

Without output_dir=, and with the base and sampler of the training, the command also writes the results into the
adapter's model card: it rewrites README.md and adapter_config.json in adapter_dir, and says so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.command import run
from stages.adapters import GuidanceAdapter
from stages.adapters.folder import CARD_FILE, CONFIG_FILE, write_card
from stages.base.loading import has_several_gpus
from stages.configuration.options import to_yaml
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Evaluation, Makers
from stages.evaluate.pareto import sentences
from stages.evaluate.processes import evaluate_over_cores
from stages.evaluate.report import table, write_report
from stages.storage.files import whole_file, write_json


def main(config: EvaluateConfig) -> None:
    evaluation = evaluate(config)
    print(table(evaluation.rows))
    print(*sentences(evaluation.rows, config.num_samples), sep="\n")
    print(f"report: {evaluation.folder / 'report.html'}")
    if (card := write_results_to_card(evaluation)) is not None:
        print(f"model card: {card} and {CONFIG_FILE} beside it now hold these results")


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate, and write the results and the report into the evaluation's folder."""
    evaluation = Evaluation(config)
    rows = evaluation.run(makers(config))
    with whole_file(evaluation.folder / "config.yaml") as file:
        file.write(to_yaml(config).encode())
    write_json(evaluation.folder / "evaluation.json", {**evaluation.metadata, "rows": rows})
    write_report(evaluation.folder, rows, evaluation.shown, evaluation.metadata)
    return evaluation


def makers(config: EvaluateConfig) -> Makers:
    """Make the parts on several GPUs through Ray, if there are several, else on this machine's cores."""
    if has_several_gpus() and config.device in ("auto", "cuda"):
        from stages.evaluate.fleet import evaluate_over_ray  # imports Ray

        return evaluate_over_ray
    return evaluate_over_cores


def write_results_to_card(evaluation: Evaluation) -> Path | None:
    """Write the rows, without their curves, into the adapter's model card; return the card's path.

    Return None, and write nothing, if `output_dir` is set or the pipeline is not that of the training.
    """
    config, folder = evaluation.config, Path(next(iter(evaluation.adapters.values())))
    as_trained = config.lora is None and config.scheduler is None and config.pretrained_model_name_or_path is None
    if config.output_dir is not None or not as_trained or "frechet_distance" not in evaluation.rows[0]:
        return None
    if not folder.is_dir():
        return None
    adapter = GuidanceAdapter.from_pretrained(folder)
    size = {"num_samples": config.num_samples, "num_inference_steps": config.num_inference_steps}
    rows = [{key: value for key, value in row.items() if not isinstance(value, list)} | size for row in evaluation.rows]
    adapter.metadata = replace(adapter.metadata, evaluation=rows)
    write_card(adapter, folder)
    return folder / CARD_FILE


if __name__ == "__main__":
    run(EvaluateConfig, main, __doc__)
