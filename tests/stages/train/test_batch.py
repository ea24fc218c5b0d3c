from __future__ import annotations

import pytest
import torch

from stages.train.batch import Batch, collate, concatenate, gather, split_by_length


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


def test_embeddings_of_several_lengths_without_a_mask_come_with_their_lengths() -> None:
    rows = [{"words": torch.ones(length, 3), "place": torch.arange(length)} for length in (2, 4, 2)]
    cond = collate(rows)
    assert cond["words_length"].tolist() == cond["place_length"].tolist() == [2, 4, 2]
    one = Batch(torch.arange(3.0), torch.arange(3), torch.arange(3.0), torch.ones(3), cond)
    other = Batch(
        torch.ones(1),
        torch.ones(1),
        torch.ones(1),
        torch.ones(1),
        collate([{"words": torch.ones(5, 3), "place": torch.arange(5)}]),
    )
    whole = concatenate([one, other])
    assert whole.cond["words_length"].tolist() == [2, 4, 2, 5]
    parts = split_by_length(whole)
    assert [chosen.tolist() for chosen, _ in parts] == [[0, 2], [1], [3]]
    for chosen, part in parts:
        assert set(part.cond) == {"words", "place"}
        assert part.cond["words"].shape[1] == whole.cond["words_length"][chosen[0]]
        assert bool((part.cond["words"] == 1).all())
        assert torch.equal(part.latent, whole.latent[chosen])


def test_a_tensor_that_is_not_a_mask_marks_no_padding() -> None:
    """Token positions are integers of the same length as a mask."""
    tokens = [{"words": torch.ones(n, 3), "words_mask": torch.ones(n, dtype=torch.bool)} for n in (2, 4)]
    assert "words_length" not in collate(tokens)
    assert "words_length" in collate([{"words": torch.ones(n, 3), "place": torch.arange(n)} for n in (3, 4)])
