from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.adapters import GuidanceAdapter
from stages.base.arguments import Arguments, Axis
from stages.base.size import DEFAULT_SIZE
from stages.train import optimization as optimization_module
from stages.train.batch import Batch
from stages.train.bins import Bins
from stages.train.defaults import RunConfig
from stages.train.objective import squared_error
from stages.train.optimization import Optimization
from stages.train.student import Student
from stages.train.telemetry import BatchPosition, Meter
from tests.conftest import VARIANTS, small_adapter, tiny_dit
from tests.stages.adapters.test_contract import METADATA


def config(**changes: Any) -> RunConfig:
    return RunConfig(
        "data", "run", **{"learning_rate": 1e-3, "max_train_steps": 100, "lr_scheduler": "constant"} | changes
    )


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def loss_of(module: nn.Module, rows: Tensor) -> Tensor:
    return module(rows).square().mean()


def test_gradients_of_several_batches_make_the_step_of_one() -> None:
    rows, weights = torch.randn(8, 3), []
    for parts in (1, 4):
        module = layer()
        optimization = Optimization(module, config(gradient_accumulation_steps=parts), "cpu")
        for part in rows.chunk(parts):
            optimization.backward(loss_of(module, part))
        optimization.step()
        weights.append(module.weight.detach())
    torch.testing.assert_close(*weights)


def test_the_norm_is_that_before_clipping() -> None:
    module = layer()
    optimization = Optimization(module, config(max_grad_norm=1e-3), "cpu")
    optimization.backward(loss_of(module, torch.randn(8, 3)))
    assert float(optimization.step()) > 1e-2


def test_an_overflow_in_half_precision_leaves_the_weights_and_lowers_the_loss_scale() -> None:
    module = layer()
    optimization = Optimization(module, config(mixed_precision="fp16"), "cpu")
    before, scale = module.weight.clone(), optimization.scaler.get_scale()
    optimization.backward(loss_of(module, torch.full((2, 3), 1e20)))
    optimization.step()
    assert torch.equal(module.weight, before)
    assert optimization.scaler.get_scale() == scale / 2
    optimization.backward(loss_of(module, torch.randn(2, 3)))
    optimization.step()
    assert not torch.equal(module.weight, before)


def test_the_average_is_used_only_within_its_context() -> None:
    module = layer()
    optimization = Optimization(module, config(use_ema=True, learning_rate=0.1), "cpu")
    for _ in range(5):
        optimization.backward(loss_of(module, torch.randn(8, 3)))
        optimization.step()
    last = module.weight.clone()
    with optimization.averaged():
        assert not torch.equal(module.weight, last)
    assert torch.equal(module.weight, last)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_makes_the_device_wait(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a value fails on the meta device, where a GPU would synchronize."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **options: adamw(*args, **options))
    denoiser = tiny_dit().transformer.requires_grad_(False)
    adapter = GuidanceAdapter.for_denoiser(small_adapter(variant), denoiser, METADATA)
    places = {"hidden_states": Axis(), "class_labels": Axis()}
    student = Student(denoiser.to("meta"), adapter.to("meta"), Arguments("hidden_states", "timestep", places, {}), [4])
    optimization, meter = (
        Optimization(adapter, config(use_ema=True), "meta"),
        Meter(Bins((1.0, 6.0), (0.0, 999.0), (DEFAULT_SIZE,)), "meta"),
    )
    batch = Batch(
        torch.randn(4, 4, 8, 8), torch.arange(4), torch.randn(4, 4, 8, 8), torch.full((4,), 2.0),
        {"class_labels": torch.arange(4)},
    ).to("meta", torch.float32)  # fmt: skip
    for step in range(2):
        losses = squared_error(student.predict(batch), batch.target)
        optimization.backward(losses.mean())
        meter.add(losses.detach(), batch, BatchPosition(step, torch.arange(4)))
        norm = optimization.step()
    with pytest.raises(RuntimeError, match="meta"):
        float(norm)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_batches_without_guidance_make_a_step_that_adds_nothing(mixed_precision: str, parts: int) -> None:
    module = layer()
    changes = {"mixed_precision": mixed_precision, "use_ema": True, "gradient_accumulation_steps": parts}
    optimization = Optimization(module, config(**changes), "cpu")
    before, unguided = module.weight.clone(), torch.tensor(0.1)
    for _ in range(parts):
        optimization.backward(unguided)
    assert float(optimization.step()) == 0
    assert torch.equal(module.weight, before)
    optimization.backward(loss_of(module, torch.randn(8, 3)))
    for _ in range(parts - 1):
        optimization.backward(unguided)
    assert float(optimization.step()) > 0
    assert not torch.equal(module.weight, before)
    assert optimization.schedule.last_epoch == 2


def test_a_process_without_guidance_has_as_many_gradients_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def reduced(gradients: Tensor, _: str) -> Tensor:
        sizes.append(len(gradients))
        return gradients

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(optimization_module, "reduce", reduced)
    module = layer()
    optimization = Optimization(module, config(), "cpu")
    for loss in (torch.tensor(0.0), loss_of(module, torch.randn(2, 3))):
        optimization.backward(loss)
        optimization.step()
    assert sizes == [4, 4]
