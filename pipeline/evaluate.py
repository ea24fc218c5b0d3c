"""Adapter against CFG and no guidance -> table, plots, report.

python -m pipeline.evaluate adapter_dir=runs/mnist_dit guidance_scale=[1.5,2,3]
"""

from __future__ import annotations

from pathlib import Path

from pipeline.command import run, to_yaml
from stages.adapters.folder import WEIGHTS_FILE
from stages.denoiser import denoiser_of
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Evaluation
from stages.evaluate.report import table, write_report
from stages.records.shard import hash_file
from stages.records.storage import whole_file, write_json


def main(config: EvaluateConfig) -> None:
    evaluation = Evaluation(config)
    rows = evaluation.run()
    folder = Path(config.output_dir or Path(config.adapter_dir) / "evaluation")
    adapter, (_, denoiser) = evaluation.adapter, denoiser_of(evaluation.pipe)
    parameters = sum(p.numel() for p in adapter.parameters())
    about = {
        "base": config.pretrained_model_name_or_path or adapter.about["base"]["pretrained_model_name_or_path"],
        "variant": adapter.variant,
        "parameters": parameters,
        "share": parameters / sum(p.numel() for p in denoiser.parameters()),
        "adapter_sha256": hash_file(Path(config.adapter_dir) / WEIGHTS_FILE),
        "num_samples": config.num_samples,
        "num_inference_steps": config.num_inference_steps,
    }
    with whole_file(folder / "config.yaml") as file:
        file.write(to_yaml(config).encode())
    write_json(folder / "evaluation.json", {**about, "rows": rows})
    report = write_report(folder, rows, evaluation.shown, about)
    print(table(rows))
    print(f"report: {report}")


if __name__ == "__main__":
    run(EvaluateConfig, main, __doc__)
