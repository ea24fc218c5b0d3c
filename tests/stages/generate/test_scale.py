from __future__ import annotations

import pytest
import torch

from stages.generate.scale import GUIDES, PerSampleScale


def test_a_pipeline_takes_it_for_a_number_that_guides() -> None:
    scale = PerSampleScale(torch.tensor([1.0, 7.0]))
    assert isinstance(scale, float)
    assert scale == GUIDES
    assert scale > 1
    assert scale * 3 == 3 * GUIDES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_sample_is_scaled_by_its_own_value_as_by_a_number(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.tensor([1.0, 7.3], dtype=torch.float64)
    batch = torch.randn(2, 4, 3, 3).to(dtype)
    weighed = PerSampleScale(values) * batch
    assert weighed.dtype == dtype
    for i, value in enumerate(values.tolist()):
        torch.testing.assert_close(weighed[i], value * batch[i])


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="2 guidance scales for a batch of 4"):
        PerSampleScale(torch.ones(2)) * torch.ones(4, 1)
