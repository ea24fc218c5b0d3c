from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.base.arguments import Arguments, Axis, Caller, decoded, encoded, stacked
from stages.base.denoiser import flatten
from stages.storage.fields import read_fields

CPU = torch.device("cpu")


def roundtrip(value: Any, rows: int = 1, asked: int = 1) -> Any:
    return decoded(json.loads(json.dumps(encoded(value, rows))), CPU)(asked)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(3),
        torch.randn(40, 5),
        torch.polar(torch.ones(9), torch.arange(9.0)),
        torch.randn(70).bfloat16(),
        torch.tensor(2.5),
        torch.zeros(0, 3),
    ],
)
def test_a_constant_tensor_comes_back_bit_for_bit(value: Tensor) -> None:
    found = roundtrip(value)
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert torch.equal(found, value)


def test_constants_of_any_nesting_come_back_as_they_were() -> None:
    for value in ([(1, 2), [3, None]], (1.5, "word", True), None, "word"):
        assert roundtrip(value) == value
        assert type(roundtrip(value)) is type(value)
    assert roundtrip([[(1, 4, 4)]] * 2, rows=2, asked=3) == [[(1, 4, 4)]] * 3
    assert roundtrip([1, 2], rows=2, asked=3) == [1, 2]
    with pytest.raises(TypeError, match="a object"):
        encoded(object(), 1)


AXES = {
    "first": (Axis(), torch.arange(12.0).view(4, 3)),
    "second": (Axis(dim=1), torch.arange(24.0).view(2, 4, 3)),
    "frames": (Axis(rows=3), torch.arange(24.0).view(12, 2)),
    "list": (Axis(listed=True), [torch.full((2, 3), float(i)) for i in range(4)]),
}


@pytest.mark.parametrize("name", AXES)
def test_samples_are_taken_first_and_put_back_where_they_were(name: str) -> None:
    axis, value = AXES[name]
    assert axis.of_samples(value) == 4
    whole = axis.taken(value, 0, 4)
    assert len(whole) == 4
    back = axis.put_back(whole)
    if axis.listed:
        assert all(map(torch.equal, back, value))
    else:
        assert torch.equal(back, value)
    assert torch.equal(axis.taken(value, 1, 3), whole[1:3])


def test_a_list_of_several_lengths_is_filled_up_and_cut_again() -> None:
    entries = [torch.ones(length, 2) for length in (3, 1)]
    taken = Axis(listed=True).taken(entries, 0, 2)
    whole, lengths = stacked(taken)
    assert whole.shape == (2, 3, 2)
    assert lengths is not None
    assert all(map(torch.equal, Axis(listed=True).put_back(whole, lengths), entries))


def test_a_call_is_put_together_from_what_was_taken_of_one() -> None:
    """Samples in a list, in the second dimension, several rows for each, beside constants in a tuple."""
    rotary = torch.arange(4.0), torch.arange(5.0)
    given = {
        "x": [torch.full((2,), float(i)) for i in range(4)],
        "t": torch.tensor([500.0] * 4),
        "layers": torch.arange(24.0).view(2, 4, 3),
        "frames": torch.arange(24.0).view(12, 2),
        "ids": torch.arange(7),
        "rotary": rotary,
        "shapes": [(1, 2)] * 4,
    }
    flat = flatten(given)
    axes = {"x": Axis(listed=True), "layers": Axis(dim=1), "frames": Axis(rows=3), "ids": Axis(shared=True)}
    constants = {name: encoded(flat[name], 4) for name in ("rotary.(0)", "rotary.(1)", "shapes")}
    arguments = Arguments("x", "t", axes, constants, ("frames",))
    assert read_fields(Arguments, json.loads(json.dumps(arguments.facts()))) == arguments
    assert arguments.rows(flat) == 4
    assert arguments.conditions == ["layers", "ids"]
    samples = arguments.samples(flat, 2, 4)
    timestep = arguments.timesteps(flat, 2)
    cond = {"layers": samples["layers"], "ids": samples["ids"], "step.frames": samples["frames"]}
    called = Caller(arguments, CPU).nested(samples["x"], timestep, cond)
    assert all(map(torch.equal, called["x"], given["x"][2:]))
    assert torch.equal(called["t"], torch.tensor([500.0, 500.0]))
    assert torch.equal(called["layers"], given["layers"][:, 2:])
    assert torch.equal(called["frames"], given["frames"][6:])
    assert torch.equal(called["ids"], given["ids"])
    assert isinstance(called["rotary"], tuple)
    assert all(map(torch.equal, called["rotary"], rotary))
    assert called["shapes"] == [(1, 2)] * 2


def test_tokens_that_are_held_do_not_count_as_the_timestep() -> None:
    arguments = Arguments("x", "t", {"x": Axis(), "t": Axis()}, {}, ("t",))
    assert arguments.timesteps({"t": torch.tensor([[0.0, 700.0], [0.0, 700.0]])}, 2).tolist() == [700.0, 700.0]
