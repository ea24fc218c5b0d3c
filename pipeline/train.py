"""Stage 2: shards -> adapter. Fit an adapter to the frozen denoiser on a dataset's records.

python -m pipeline.train --config configs/train/lora.yaml data_dir=data/mnist_dit output_dir=runs/mnist_dit
python -m pipeline.train --multirun data_dir=data/mnist_dit output_dir=runs/sweep adapter.variant=offset,lora seed=0,1

With --dry-run, the command checks the options, tells how the base's layers would be held and the predicted peak of
memory, says whether this machine can do so, and stops before it loads or writes anything. With --multirun, it trains
every combination of the comma-separated values and compares them in one table. `accelerate launch -m pipeline.train
...` trains on several GPUs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.command import run
from stages.adapters.folder import CONFIG_FILE
from stages.base.loading import choose_device
from stages.configuration.options import to_yaml
from stages.errors import UserError
from stages.records.plans import snapshots
from stages.storage.files import whole_file, write_json
from stages.storage.folder import open_folder
from stages.study.multirun import multirun
from stages.train.config import TrainConfig
from stages.train.processes import from_main, join_processes
from stages.train.trainer import Trainer


def main(config: TrainConfig) -> None:
    root = Path(config.output_dir)
    resolved = to_yaml(replace(config, resume_from_checkpoint=None))  # a resumed run is the same run
    processes = join_processes(choose_device(config.device))
    if from_main(lambda: is_trained(root, resolved, config.data_dir)):
        if processes.is_main_process:
            print(f"{root}: already trained with this configuration; nothing to do")
        return
    trainer = Trainer(config)
    with trainer.alone():
        train(trainer, root, resolved)
    trainer.processes.wait_for_everyone()  # a process that exits earlier would take the others down
    trainer.processes.destroy_process_group()


def dry_run(config: TrainConfig) -> None:
    trainer = Trainer(config, dry_run=True)
    if trainer.processes.is_main_process:
        print(trainer.foresight, *trainer.remarks, sep="\n", flush=True)
    trainer.check_machine()


def train(trainer: Trainer, root: Path, resolved: str) -> None:
    if trainer.processes.is_main_process:
        begin(root, resolved, trainer)
    summary = trainer.run()
    if trainer.processes.is_main_process:
        write_json(root / "training.json", summary)
        print(
            f"{root}: {summary['steps']} steps, validation loss {summary['validation_loss']:.5f} (without guidance "
            f"{summary['validation_loss_unguided']:.5f}), {summary['records_per_second']:.0f} records/s{skipped(summary)}"
            f"{lowest(root, summary)}"
        )


def is_trained(root: Path, resolved: str, data_dir: str) -> bool:
    """Whether the folder holds an adapter that was trained to the end with this configuration.

    Raises:
        UserError: it does, and another dataset is there now; the adapter's own may have grown since.
    """
    finished = (root / "training.json").is_file() and (root / "config.yaml").is_file()
    if not finished or (root / "config.yaml").read_bytes() != resolved.encode():
        return False
    trained_on = json.loads((root / CONFIG_FILE).read_bytes())["dataset_fingerprint"]
    present = snapshots(open_folder(data_dir))
    if present and trained_on not in present:
        raise UserError(
            f"{root}: holds an adapter of another dataset than that in data_dir={data_dir}: take another output_dir"
        )
    return True


def begin(root: Path, resolved: str, trainer: Trainer) -> None:
    (root / "training.json").unlink(missing_ok=True)  # its existence means that config.yaml was trained to the end
    with whole_file(root / "config.yaml") as file:
        file.write(resolved.encode())
    dataset = trainer.dataset
    if str(dataset.root) != trainer.config.data_dir:
        print(f"data_dir: {dataset.root}")  # the commit that a branch on the hub names now
    if not dataset.newest:
        trajectories = dataset.plan.counts.trajectories
        print(f"{dataset.root}: has grown; the run continues with the {trajectories} trajectories that it started with")
    if trainer.step:
        print(f"{root}: continues after step {trainer.step} of {trainer.config.max_train_steps}")
    print(trainer.foresight)
    print(
        f"{trainer.adapter.variant}: {trainer.adapter_parameters:,} parameters at {len(trainer.adapter.shapes)} sites, "
        f"{trainer.adapter_share:.1%} of the base"
    )
    print(*trainer.remarks, sep="\n")


def lowest(root: Path, summary: dict[str, Any]) -> str:
    best = summary["best"]
    if best is None or best["step"] == summary["steps"]:
        return ""
    return f"; the lowest was {best['validation_loss']:.5f} after {best['step']} steps, in {root / best['folder']}"


def skipped(summary: dict[str, Any]) -> str:
    records, samples = summary["records_skipped"], len(summary["samples_skipped"])
    return f"; {records} damaged records in {samples} samples skipped" if records else ""


if __name__ == "__main__":
    run(TrainConfig, main, __doc__, multirun, dry_run=dry_run)
