from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.records.teacher import TeacherFacts
from stages.storage.fields import read_fields
from tests.support.made_up import teacher_facts


def test_facts_are_written_as_they_are_read_back() -> None:
    config = {"betas": np.linspace(0, 1, 3), "range": (0.5, 1.0), "path": Path("x")}
    found = teacher_facts(scheduler_config=config).to_json()
    assert found["scheduler_config"] == {"betas": [0, 0.5, 1], "range": [0.5, 1.0], "path": "x"}
    assert read_fields(TeacherFacts, found).to_json() == found
