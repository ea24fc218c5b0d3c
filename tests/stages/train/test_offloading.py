"""Offloaded training on a CPU, where a layer that is not loaded holds NaN in place of its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import GroupOffloadingConfig, GroupOffloadingType, ModuleGroup
from safetensors.torch import load_file
from torch import nn

from stages.records.dataset import Dataset
from stages.train import base, offloading
from stages.train.trainer import Trainer
from tests.benchmarks.tiny_shapes import shape_named
from tests.conftest import train_config
from tests.stages.train.steps import gradients

LOADED: Counter[int] = Counter()  # by group


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace how a group of layers moves: loading copies its weights, and NaN takes their place afterwards."""
    stored: dict[int, torch.Tensor] = {}

    def tensors(group: ModuleGroup) -> list[torch.Tensor]:
        of_modules = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
        return [t for t in (*of_modules, *group.parameters, *group.buffers) if t.is_floating_point()]

    def load(group: ModuleGroup) -> None:
        LOADED[id(group)] = 1
        for tensor in tensors(group):
            tensor.data = stored.get(id(tensor), tensor.data).clone()

    def unload(group: ModuleGroup) -> None:
        LOADED.pop(id(group), None)
        for tensor in tensors(group):
            stored.setdefault(id(tensor), tensor.data)
            tensor.data = torch.full_like(tensor.data, torch.nan)

    def again(weight: torch.Tensor, device: torch.device, layout: tuple[Any, ...]) -> torch.Tensor:
        return stored.get(id(weight), weight.detach()).as_strided(*layout)

    LOADED.clear()
    monkeypatch.setattr(ModuleGroup, "onload_", load)
    monkeypatch.setattr(ModuleGroup, "offload_", unload)
    monkeypatch.setattr(offloading, "load", again)


def with_stream(denoiser: nn.Module, device: str) -> None:
    """Offload as on a GPU: with a stream, so that the next layer is loaded ahead of time."""
    stream = SimpleNamespace(synchronize=lambda: None)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(ModuleGroup, "_init_cpu_param_dict", lambda group: {})
    cpu = torch.device("cpu")
    config = GroupOffloadingConfig(
        cpu,
        cpu,
        GroupOffloadingType.LEAF_LEVEL,
        non_blocking=True,
        record_stream=True,
        low_cpu_mem_usage=False,
        stream=stream,
    )
    offloading.alias_weights(denoiser)
    group_offloading._apply_group_offloading(denoiser, config)
    monkey.undo()
    offloading.keep_one_prefetched(denoiser)


@pytest.mark.parametrize("shape", ["tiny_sdxl", "tiny_sd3", "tiny_dit_xl_2_256"])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("offload", [offloading.offload, with_stream])
@pytest.mark.usefixtures("a_gpu")
def test_gradients_are_the_same_bit_for_bit(shape: str, checkpointed: bool, offload: Any) -> None:
    whole = gradients(shape_named(shape), checkpointed, steps=2)
    offloaded = gradients(shape_named(shape), checkpointed, steps=2, prepare=offload)
    assert all(torch.equal(one, other) for one, other in zip(whole, offloaded, strict=True))
    assert len(LOADED) <= 1  # the first layer of the next pass


def test_training_ends_with_the_same_weights(shared_dataset: Path, tmp_path: Path) -> None:
    def weights(**options: Any) -> dict[str, torch.Tensor]:
        output = tmp_path / str(len(options))
        Trainer(train_config(shared_dataset, output, gradient_checkpointing=True, **options)).run()
        return load_file(output / "adapter_model.safetensors")

    whole, offloaded = weights(), weights(enable_group_offload=True)
    assert all(torch.equal(whole[name], offloaded[name]) for name in whole)


def test_it_computes_where_its_layers_are_loaded(dataset: Dataset) -> None:
    denoiser = base.load_base(dataset, offloaded=True)
    assert offloading.is_offloaded(denoiser)
    assert base.device_of(denoiser) == torch.device("cpu")
    assert not offloading.is_offloaded(base.load_base(dataset))
