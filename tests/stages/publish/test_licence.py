"""The licence of a teacher's weights: in a folder, on a hub, and where nobody states one."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.publish.licence import licence_of
from tests.support.hub import Hub

CARDS = [
    ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
    ("---\nlicense: other\nlicense_name: some-terms\n---\n", "some-terms"),
    ("---\nlicense: other\n---\n", "other"),
    ("---\ntags: [x]\n---\n", None),
    ("no header\n", None),
    ("---\nlicense: [\n---\n", None),
]


@pytest.mark.parametrize(("card", "expected"), CARDS)
def test_of_a_folder(tmp_path: Path, card: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence_of(str(tmp_path), None) == expected


@pytest.mark.parametrize(("card", "expected"), CARDS[:-1])
def test_of_a_repository(hub: Hub, card: str, expected: str | None) -> None:
    hub.add("someone/teacher", {"README.md": card.encode()})
    assert licence_of("someone/teacher", None) == expected
    assert licence_of("someone/teacher", "nowhere") is None


def test_where_there_is_no_card(hub: Hub, tmp_path: Path) -> None:
    assert licence_of(str(tmp_path), None) is None
    assert licence_of("someone/nothing", None) is None
    hub.stop()
    assert licence_of("someone/teacher", None) is None
