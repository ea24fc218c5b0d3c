from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from stages.configuration.options import check_bounds, option
from stages.errors import UsageError


@dataclass
class Inner:
    share: float = option(0.5, "a share", above=0, at_most=1)


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    count: int = option(1, "how many", at_least=1)
    kind: str = option("a", "which", one_of=("a", "b"))
    free: list[int] = option(list, "anything")


def test_defaults_keep_their_bounds_and_lists_are_not_shared() -> None:
    check_bounds(Outer())
    assert Outer().free is not Outer().free


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Outer(count=0), "count=0: at least 1"),
        (Outer(kind="c"), "kind=c: one of a, b"),
        (Outer(Inner(0)), "inner.share=0: more than 0"),
        (Outer(Inner(1.5)), "inner.share=1.5: at most 1"),
        (Outer(Inner(float("nan"))), "inner.share=nan: more than 0"),
    ],
)
def test_a_value_out_of_bounds_names_key_value_and_bound(config: Outer, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_bounds(config)
