"""Places of files as they are published."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.base.loading import PROJECT_ROOT
from stages.base.places import is_on_hub, map_strings, public, short_name, whereabouts

SHIPPED = "stages/embedded/mnist_dit"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/home/me/models/base", "base"),
        ("~/models/base.safetensors", "base.safetensors"),
        ("../base/", "base"),
        ("file:///home/me/prompts.txt", "prompts.txt"),
        (str(PROJECT_ROOT / SHIPPED), SHIPPED),
        (SHIPPED, SHIPPED),
        ("models/base", "models/base"),
        ("someone/base", "someone/base"),
        ("s3://bucket/prompts.txt", "s3://bucket/prompts.txt"),
        ("a prompt, and/or a sentence ...", "a prompt, and/or a sentence ..."),
        ("", ""),
        ("/", "/"),
    ],
)
def test_a_published_place_is_none_on_this_machine(place: str, expected: str) -> None:
    assert public(place) == expected
    assert map_strings({"a": [place, 1, None], "b": {"c": place}}, public) == {
        "a": [expected, 1, None],
        "b": {"c": expected},
    }
    assert public(expected) == expected


def test_a_card_says_where_the_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whereabouts("someone/base") == short_name("someone/base") == "someone/base"
    for shipped in (SHIPPED, str(PROJECT_ROOT / SHIPPED)):
        assert whereabouts(shipped) == (
            f"mnist_dit, which ships with the Python package adapter-guidance-distillation: {SHIPPED}"
        )
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for local in (str(tmp_path / "models" / "base"), "models/base", "../base", "base"):
        assert not is_on_hub(local)
        assert whereabouts(local) == "base, a local folder of its author: its weights are not on the hub"
