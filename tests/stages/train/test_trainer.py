from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.denoiser import fingerprint
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.trainer import Trainer
from tests.conftest import VARIANTS, small_adapter, train_config


def test_a_plain_lora_is_not_trained_on_many_scales(shared_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora_fixed: learns one scale, the records have 1 to 6"):
        Trainer(train_config(shared_dataset, tmp_path, adapter=small_adapter("lora_fixed")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_error_and_leaves_the_base_bit_for_bit(
    request: pytest.FixtureRequest, tmp_path: Path, variant: str
) -> None:
    data = request.getfixturevalue("dataset_of_one_scale" if variant == "lora_fixed" else "shared_dataset")
    config = train_config(
        data, tmp_path, adapter=small_adapter(variant), max_train_steps=150, validation_share=0.1, learning_rate=3e-3
    )
    trainer = Trainer(config)
    before = fingerprint(trainer.student.denoiser)
    summary = trainer.run()
    assert fingerprint(trainer.student.denoiser) == before == Dataset(data).info["teacher"]["denoiser_fingerprint"]
    assert summary["steps"] == 150
    assert summary["validation_loss"] < 0.97 * summary["validation_loss_unguided"]
    assert summary["adapter_parameters"] == sum(p.numel() for p in trainer.adapter.parameters())
    assert summary["records_per_second"] > 0
    assert summary["peak_memory_bytes"] > 0


def test_the_folder_is_that_of_an_adapter(tiny_adapter: Path) -> None:
    assert {path.name for path in tiny_adapter.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    adapter = GuidanceAdapter.from_pretrained(tiny_adapter)
    assert adapter.variant == "modulated_low_rank"
    assert adapter.about["scale_range"] == [1.0, 6.0]
    assert "base_model_relation: adapter" in (tiny_adapter / "README.md").read_text()


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(
    shared_dataset: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    config = train_config(shared_dataset, tmp_path)
    shutil.copytree(tiny_adapter / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-00000012.pt").unlink()
    trainer = Trainer(replace(config, resume_from_checkpoint="latest"))
    assert trainer.step == 8
    trainer.run()
    one, other = (load_file(root / "adapter_model.safetensors") for root in (tiny_adapter, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_another_dataset_or_adapter_is_refused(
    shared_dataset: Path, damaged: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    checkpoint = str(tiny_adapter / "checkpoints" / "step-00000008.pt")
    for changes, told in (
        ({"adapter": AdapterConfig("offset", hidden_size=16)}, "adapter=.*: the checkpoint's run had"),
        ({"seed": 1}, "seed=1: the checkpoint's run had 0"),
        ({"max_train_steps": 7}, "max_train_steps=7: the checkpoint is already at step 8"),
    ):
        with pytest.raises(UserError, match=told):
            Trainer(train_config(shared_dataset, tmp_path, resume_from_checkpoint=checkpoint, **changes))
    state = torch.load(checkpoint, weights_only=True) | {"dataset_fingerprint": "0" * 64}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not the dataset of the checkpoint: fingerprint .*000000000000"):
        Trainer(train_config(shared_dataset, tmp_path, resume_from_checkpoint=str(tmp_path / "other.pt")))


def test_a_folder_with_an_adapter_is_kept(shared_dataset: Path, tiny_adapter: Path) -> None:
    with pytest.raises(UserError, match="holds an earlier run"):
        Trainer(train_config(shared_dataset, tiny_adapter, seed=5))


def test_a_run_resumed_at_its_end_only_writes_the_folder(
    shared_dataset: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    checkpoint = str(tiny_adapter / "checkpoints" / "step-00000012.pt")
    summary = Trainer(train_config(shared_dataset, tmp_path, resume_from_checkpoint=checkpoint)).run()
    assert summary["steps"] == 12
    assert summary["loss"] > 0
    assert GuidanceAdapter.from_pretrained(tmp_path).variant == "modulated_low_rank"


def test_the_log_holds_loss_and_learning_rate(shared_dataset: Path, tmp_path: Path) -> None:
    Trainer(train_config(shared_dataset, tmp_path, report_to="tensorboard", validation_steps=6)).run()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [4, 8, 12]
    assert [point.step for point in events.Scalars("validation_loss")] == [6, 12]
    assert events.Scalars("learning_rate")[-1].value >= 0


def test_bf16_keeps_the_adapter_in_fp32(shared_dataset: Path, tmp_path: Path) -> None:
    trainer = Trainer(train_config(shared_dataset, tmp_path, mixed_precision="bf16", max_train_steps=3))
    assert trainer.run()["loss"] > 0
    assert all(parameter.dtype == torch.float32 for parameter in trainer.adapter.parameters())


@pytest.mark.parametrize("loss", ["l1", "noise_weighted"])
def test_every_loss_trains(shared_dataset: Path, tmp_path: Path, loss: str) -> None:
    config = train_config(shared_dataset, tmp_path, loss=loss, max_train_steps=100, learning_rate=3e-3)
    summary = Trainer(config).run()
    assert summary["validation_loss"] < summary["validation_loss_unguided"]


def test_a_loss_that_is_not_a_number_stops_the_run(shared_dataset: Path, tmp_path: Path) -> None:
    trainer = Trainer(train_config(shared_dataset, tmp_path))
    with torch.no_grad():
        next(trainer.adapter.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="step 4: the loss is not a number"):
        trainer.run()
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_batch_size": 0}, "train_batch_size=0"),
        ({"validation_share": 1.0}, "validation_share=1.0"),
        ({"mixed_precision": "fp8"}, "mixed_precision=fp8"),
        ({"lr_scheduler": "magic"}, "lr_scheduler=magic"),
        ({"report_to": "paper"}, "report_to=paper"),
        ({"loss": "l3"}, "loss=l3: one of l2, l1, noise_weighted"),
        ({"validation_share": 0.99}, "nothing is left"),
        ({"seed": -1}, "seed=-1: at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: more than 0"),
        ({"adapter": AdapterConfig(rank=0)}, "adapter.rank=0: at least 1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0: more than 0"),
    ],
)
def test_what_no_run_could_carry_out_is_refused(shared_dataset: Path, tmp_path: Path, changes: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Trainer(train_config(shared_dataset, tmp_path, **changes))


def test_the_summary_is_json(shared_dataset: Path, tmp_path: Path) -> None:
    summary = Trainer(train_config(shared_dataset, tmp_path)).run()
    assert json.loads(json.dumps(summary)) == summary
