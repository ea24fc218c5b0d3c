from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from stages.storage.fields import FieldError, read_fields


@dataclass(frozen=True)
class Inner:
    number: float
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    whole: int
    pair: tuple[Inner, ...]
    by_name: dict[str, Inner]
    labels: list[int]
    anything: Any
    perhaps: Inner | None = None
    rest: dict[str, Any] = field(default_factory=dict)


CONTENT: dict[str, Any] = {
    "whole": 1, "pair": [{"number": 2}, {"number": 2.5, "name": "b"}], "by_name": {"c": {"number": 0.0}},
    "labels": [3, 4],
    "anything": [None],
}  # fmt: skip


def test_an_object_becomes_a_dataclass_of_dataclasses() -> None:
    read = read_fields(Outer, CONTENT | {"more": 0})
    assert read == Outer(1, (Inner(2), Inner(2.5, "b")), {"c": Inner(0.0)}, [3, 4], [None])
    assert type(read.pair[0].number) is int, "a number is written again as it was"
    assert read_fields(Outer, asdict(read) | {"pair": list(asdict(read)["pair"])}) == read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whole": True}, "whole is bool, not int"),
        ({"whole": 1.0}, "whole is float, not int"),
        ({"whole": None}, "whole is NoneType, not int"),
        ({"pair": {}}, "pair is dict, not list"),
        ({"pair": [{"number": 1}, {}]}, "no pair[1].number"),
        ({"by_name": {"c": 1}}, "by_name.c is no object"),
        ({"labels": [1, "2"]}, "labels[1] is str, not int"),
        ({"perhaps": {"number": "1"}}, "perhaps.number is str, not float"),
    ],
)
def test_a_mistyped_key_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError) as raised:
        read_fields(Outer, CONTENT | changes)
    assert str(raised.value) == message


def test_a_missing_key_is_named() -> None:
    with pytest.raises(FieldError, match="^no labels$"):
        read_fields(Outer, {key: value for key, value in CONTENT.items() if key != "labels"})
    with pytest.raises(FieldError, match="^the content is no object$"):
        read_fields(Outer, [])
