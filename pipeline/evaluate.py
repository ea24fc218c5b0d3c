"""Adapter against CFG and no guidance -> table, plots, report.

python -m pipeline.evaluate adapter_dir=runs/mnist_dit guidance_scale=[1.5,2,3]
"""

from __future__ import annotations

from pathlib import Path

from pipeline.command import run, to_yaml
from stages.adapters.folder import describe
from stages.denoiser import denoiser_of, fingerprint
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Evaluation
from stages.evaluate.report import table, write_report
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
        "adapter_fingerprint": fingerprint(adapter),
        "num_samples": config.num_samples,
        "num_inference_steps": config.num_inference_steps,
    }
    with whole_file(folder / "config.yaml") as file:
        file.write(to_yaml(config).encode())
    write_json(folder / "evaluation.json", {**about, "rows": rows})
    report = write_report(folder, rows, evaluation.shown, about)
    if config.output_dir is None and Path(config.adapter_dir).is_dir():
        adapter.about["evaluation"] = rows
        describe(adapter, Path(config.adapter_dir))
    print(table(rows))
    print(f"report: {report}")


if __name__ == "__main__":
    run(EvaluateConfig, main, __doc__)
