from __future__ import annotations

import torch

from stages.train.objective import squared_error


def test_it_is_the_mean_square_of_each_record() -> None:
    prediction, target = torch.zeros(2, 3, 2, 2, dtype=torch.bfloat16), torch.ones(2, 3, 2, 2)
    target[1] *= 2
    assert torch.equal(squared_error(prediction, target), torch.tensor([1.0, 4.0]))
