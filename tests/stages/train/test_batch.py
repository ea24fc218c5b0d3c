from __future__ import annotations

import pytest
import torch

from stages.errors import UserError
from stages.train.batch import Batch, collate, concatenate, gather


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_records_are_gathered_as_torch_does(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randint(0, 2, (6, *shape)).to(dtype)
    for chosen in (torch.tensor([4, 0, 4]), torch.tensor([], dtype=torch.long)):
        gathered = gather(values, chosen)
        assert gathered.dtype == dtype
        assert torch.equal(gathered, values[chosen])


def test_embeddings_of_several_lengths_are_padded_with_their_masks() -> None:
    rows = [{"words": torch.ones(n, 3), "words_mask": torch.ones(n, dtype=torch.bool)} for n in (2, 4)]
    cond = collate(rows)
    assert cond["words"].shape == (2, 4, 3)
    assert cond["words"].sum((1, 2)).tolist() == [6, 12]
    assert cond["words_mask"].tolist() == [[True, True, False, False], [True] * 4]
    zeros = torch.zeros(1)
    parts = [Batch(zeros, zeros, zeros, zeros, collate([row])) for row in rows]
    assert torch.equal(concatenate(parts).cond["words"], cond["words"])
    assert torch.equal(concatenate(parts).cond["words_mask"], cond["words_mask"])


def test_embeddings_of_several_lengths_without_a_mask_are_refused() -> None:
    with pytest.raises(UserError, match="cond.words differs in length .* has no mask"):
        collate([{"words": torch.ones(2, 3)}, {"words": torch.ones(4, 3)}])
