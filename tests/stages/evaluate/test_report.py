from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image

from stages.evaluate.comparisons import settings
from stages.evaluate.report import table, write_report

ROWS = [
    {
        "method": setting.method,
        "guidance_scale": setting.guidance_scale,
        "frechet_distance": 20.0 + i,
        "class_accuracy": 0.9,
        "gap_closed": 0.5,
        "denoiser_evaluations": 25.0,
        "seconds_per_image": 0.01,
        "time_relative_to_none": 1.0,
    }
    for i, setting in enumerate(settings([1.5, 3.0]))
]
ABOUT = {
    "base": "<b>base</b>",
    "variant": "offset",
    "parameters": 1000,
    "share": 0.02,
    "num_samples": 10,
    "num_inference_steps": 25,
}


def test_the_table_has_a_line_per_row() -> None:
    lines = table(ROWS).splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[:5] == ["guided,", "two", "passes", "1.5", "21.0"]


def test_the_report_is_one_self_contained_file_with_plots_beside_it(tmp_path: Path) -> None:
    shown = {setting: torch.zeros(2, 1, 8, 8) for setting in settings([1.5, 3.0])}
    page = write_report(tmp_path, ROWS, shown, ABOUT).read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 6
    assert all(source.startswith("data:") for source in sources)
    assert "<b>base</b>" not in page
    assert "&lt;b&gt;base" in page
    for name in ("frechet_distance", "class_accuracy", "gap_closed"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 300
