from __future__ import annotations

import pytest

from stages.errors import UsageError
from stages.evaluate.comparisons import Setting, settings
from stages.evaluate.methods import (
    CFG,
    COMPARED,
    KINDS,
    NONE,
    check_compared,
    interval_of,
    ordinal,
    parse,
    rule_of,
    title_of,
    uses_adapter,
)
from stages.evaluate.rules import Agreement, Every, FirstSteps, Interval


def test_a_method_is_a_kind_and_its_numbers() -> None:
    assert parse("one_pass") == ("one_pass", ())
    assert parse("cfg_interval_0_7") == ("cfg_interval", (0.0, 7.0))
    assert parse("one_pass_interval_20_80") == ("one_pass_interval", (20.0, 80.0))
    assert parse("cfg_adaptive_0.995") == ("cfg_adaptive", (0.995,))
    check_compared([*COMPARED, *(each.example for name, each in KINDS.items() if name not in (NONE, CFG))])


@pytest.mark.parametrize(
    "method",
    [
        "",
        "two_pass",
        "cfg_first",
        "cfg_first_050",
        "cfg_first_5.5",
        "cfg_first_50_60",
        "cfg_interval_20",
        "cfg_interval_20_80_90",
        "cfg_adaptive_",
        "cfg_adaptive_1..5",
        "one_pass_20",
        "cfg_interval(20,80)",
    ],
)
def test_no_other_name_is_a_method(method: str) -> None:
    with pytest.raises(
        UsageError, match="^methods=.*: some of one_pass, cfg_first_50, cfg_interval_20_80, .* other numbers$"
    ):
        parse(method)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("cfg_first_150", "150 is out of range: 0 to 100"),
        ("cfg_interval_20_101", "101 is out of range: 0 to 100"),
        ("cfg_adaptive_99", "99 is out of range: 0 to 1"),
        ("cfg_every_0", "0 is out of range: 1 to 1000"),
        ("cfg_interval_80_20", "the interval is empty: the second number must be the larger one"),
        ("one_pass_interval_50_50", "the interval is empty: the second number must be the larger one"),
    ],
)
def test_a_number_out_of_range_is_named(method: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^methods={method}: {message}$"):
        parse(method)


def test_the_baselines_need_not_be_named() -> None:
    with pytest.raises(UsageError, match="methods=cfg: none and cfg are always included: leave it out"):
        check_compared(["cfg"])


def test_each_method_of_cfg_has_its_rule_and_one_pass_its_adapter() -> None:
    rules = {
        "cfg_first_60": FirstSteps,
        "cfg_interval_20_80": Interval,
        "cfg_adaptive_0.9": Agreement,
        "cfg_every_3": Every,
    }
    for method, kind in rules.items():
        assert type(rule_of(method)) is kind
        assert rule_of(method) is not rule_of(method)  # a rule serves one sampling
        assert not uses_adapter(method)
        assert interval_of(method) is None
    for method in ("none", "cfg", "one_pass", "one_pass_interval_20_80"):
        assert rule_of(method) is None
        assert uses_adapter(method) == method.startswith("one_pass")
    interval = interval_of("one_pass_interval_20_80")
    assert interval is not None
    assert [step for step in range(20) if interval.contains(step, 20)] == list(range(4, 16))
    found = settings([2.0], ["cfg_every_2", "one_pass_interval_20_80"], ["a", "b"])
    assert found[2:] == [
        Setting("cfg_every_2", 2.0),
        Setting("one_pass_interval_20_80", 2.0, "a"),
        Setting("one_pass_interval_20_80", 2.0, "b"),
    ]


def test_methods_have_words_of_their_own() -> None:
    methods = ["cfg_first_50", "cfg_first_60", "cfg_interval_20_80", "cfg_adaptive_0.99", "cfg_every_2", "cfg_every_3"]
    assert [title_of(method) for method in methods[2:]] == [
        "guided, 20% to 80%",
        "guided until 0.99 alike",
        "guided every 2nd step",
        "guided every 3rd step",
    ]
    assert title_of("one_pass_interval_20_80", "mine", ["mine", "yours"]) == "one pass, 20% to 80%, mine"
    assert title_of("one_pass_interval_20_80", "mine", ["mine"]) == "one pass, 20% to 80%"
    assert [ordinal(number) for number in (1, 4, 11, 12, 21, 22)] == ["1st", "4th", "11th", "12th", "21st", "22nd"]
