from __future__ import annotations

from pathlib import Path

from tests.pipelines_zoo.gathered import gather
from tests.pipelines_zoo.refusals import REFUSALS
from tests.pipelines_zoo.table import page


def test_the_page_is_up_to_date() -> None:
    assert REFUSALS.keys() <= gather().keys()
    assert (Path(__file__).parent / "README.md").read_text() == page()
