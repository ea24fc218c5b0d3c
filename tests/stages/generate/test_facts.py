from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from stages.generate.teacher import Teacher
from tests.conftest import generate_config


def test_facts_are_equal_to_those_read_back_from_a_file(tiny_teacher: Path) -> None:
    facts = Teacher(generate_config(tiny_teacher, Path("nowhere")), {"class_label": 1}).facts()
    facts = replace(facts, scheduler_config={"betas": np.linspace(0, 1, 3), "range": (0.5, 1.0), "path": Path("x")})
    found = facts.to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["scheduler_config"] == {"betas": [0, 0.5, 1], "range": [0.5, 1.0], "path": "x"}
    assert found["layout"] == json.loads(json.dumps(facts.layout.facts()))
    assert found["denoisers"]["transformer"]["denoiser_fingerprint"] == found["denoiser_fingerprint"]
