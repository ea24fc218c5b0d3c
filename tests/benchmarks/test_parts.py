"""The result of a measurement with failing parts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.parts import Part, Row, run


def good(count: int) -> Iterator[Row]:
    yield from ({"number": i} for i in range(count))


def failing() -> Iterator[Row]:
    yield {"number": 0}
    raise ValueError("no such kernel")


def endless() -> Iterator[Row]:
    yield {"pid": os.getpid()}
    time.sleep(600)


def dying() -> Iterator[Row]:
    yield {"number": 0}
    os._exit(7)


def test_a_failed_part_keeps_its_rows_and_does_not_affect_the_others(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    chosen = [
        Part("failing", 60, failing),
        Part("endless", 8, endless),
        Part("dying", 60, dying),
        Part("good", 60, good, (2,)),
    ]
    run(file, 120, chosen)
    info = json.loads(file.read_text())["parts"]
    assert list(info) == [part.name for part in chosen]
    assert [len(part["rows"]) for part in info.values()] == [1, 1, 1, 2]
    assert [part["error"] for part in info.values()] == [
        "ValueError: no such kernel",
        "stopped after 8 s",
        "its process ended with status 7",
        None,
    ]
    assert not Path(f"/proc/{info['endless']['rows'][0]['pid']}").exists()


def test_no_part_exceeds_the_time_of_all(tmp_path: Path) -> None:
    info = run(tmp_path / "out.json", 4, [Part("endless", 60, endless), Part("good", 60, good, (1,))])
    assert [part["error"] for part in info["parts"].values()] == ["stopped after 4 s", "stopped after 0 s"]
    assert info["seconds"] < 60
