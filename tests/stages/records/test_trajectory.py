from __future__ import annotations

import pytest
import torch

from stages.records.schema import TensorSpec
from stages.records.trajectory import PER_RECORD, Trajectory, from_members, tensor_specs


def trajectory(steps: int = 5) -> Trajectory:
    return Trajectory(
        index=7,
        seed=11,
        scale=2.5,
        condition={"class_label": 3},
        latent=torch.randn(steps, 4, 2, 2, dtype=torch.float16),
        timestep=torch.arange(steps).flip(0),
        target=torch.randn(steps, 4, 2, 2, dtype=torch.float16),
        cond={"class_labels": torch.tensor(3)},
        guidance_cosine=torch.rand(steps),
        guidance_delta=torch.rand(steps),
    )


def test_members_round_trip_bit_for_bit() -> None:
    before = trajectory()
    members = before.to_members()
    after = from_members(members["safetensors"], members["json"])
    assert (after.index, after.part, after.seed, after.scale, after.condition) == (
        7,
        0,
        11,
        2.5,
        {"class_label": 3},
    )
    for name in PER_RECORD:
        assert torch.equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype
    assert after.cond.keys() == before.cond.keys()
    assert torch.equal(after.cond["class_labels"], before.cond["class_labels"])


def test_parts_hold_every_record_once_in_order() -> None:
    whole = trajectory(5)
    parts = list(whole.parts(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    for name in PER_RECORD:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert len({part.key for part in parts}) == 3
    assert all(set(part.key) <= set("0123456789_") for part in parts)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [(b"not safetensors", b"{}"), (b"", b"no json"), (trajectory().to_members()["safetensors"], b"{}")],
)
def test_anything_other_than_a_sample_is_refused(tensors: bytes, metadata: bytes) -> None:
    with pytest.raises(ValueError, match="not a sample"):
        from_members(tensors, metadata)


def test_the_description_is_of_one_record() -> None:
    specs = tensor_specs(trajectory())
    assert specs["latent"] == TensorSpec("float16", [4, 2, 2])
    assert specs["guidance_cosine"] == specs["guidance_delta"] == TensorSpec("float32", [])
    assert specs["timestep"] == TensorSpec("int64", [])
    assert specs["cond.class_labels"] == TensorSpec("int64", [])
