from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.base import cast, load_base


def test_only_the_denoiser_is_loaded_and_it_is_frozen(dataset: Dataset) -> None:
    denoiser = load_base(dataset)
    assert type(denoiser).__name__ == "DiTTransformer2DModel"
    assert not denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_other_weights_than_the_teachers_are_refused(dataset: Dataset, other_teacher: Path) -> None:
    with pytest.raises(UserError, match="not the weights that made .*: fingerprint"):
        load_base(dataset, str(other_teacher))


def test_a_missing_base_is_named(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing: no DiTTransformer2DModel could be loaded"):
        load_base(dataset, str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_base_has_the_requested_precision(dataset: Dataset, precision: str, dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in load_base(dataset, mixed_precision=precision).parameters()} == {dtype}


def test_modules_kept_in_fp32_stay_in_fp32() -> None:
    class Makers(torch.nn.Module):
        _keep_in_fp32_modules = ("norm",)

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)

    module = Makers()
    cast(module, torch.bfloat16)
    assert (module.norm.weight.dtype, module.linear.weight.dtype) == (torch.float32, torch.bfloat16)
