"""Stage 2: shards -> adapter. Stream a dataset's records and fit an adapter to the frozen denoiser.

python -m pipeline.train --config configs/train/modulated_low_rank.yaml data_dir=data/mnist_dit output_dir=runs/mnist_dit
"""

from __future__ import annotations

from pathlib import Path

from pipeline.command import run, to_yaml
from stages.records.storage import whole_file, write_json
from stages.train.config import TrainConfig
from stages.train.trainer import Trainer


def main(config: TrainConfig) -> None:
    root = Path(config.output_dir)
    if (root / "training.json").exists() and (root / "config.yaml").read_text() == to_yaml(config):
        print(f"{root}: already trained with this configuration; nothing to do")
        return
    trainer = Trainer(config)
    (root / "training.json").unlink(missing_ok=True)  # it tells that config.yaml, written next, was trained to its end
    with whole_file(root / "config.yaml") as file:
        file.write(to_yaml(config).encode())
    print(
        f"{config.adapter.variant}: {trainer.adapter_parameters:,} parameters at {len(trainer.adapter.shapes)} sites, "
        f"{trainer.adapter_share:.1%} of the base"
    )
    summary = trainer.run()
    write_json(root / "training.json", summary)
    print(
        f"{root}: {summary['steps']} steps, validation loss {summary['validation_loss']:.5f} "
        f"(without guidance {summary['validation_loss_unguided']:.5f}), {summary['records_per_second']:.0f} records/s"
    )


if __name__ == "__main__":
    run(TrainConfig, main, __doc__)
