from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stages.evaluate.comparisons import settings
from stages.evaluate.methods import CFG, COMPARED, NONE
from stages.evaluate.report import table, write_report

SCALES = [1.5, 3.0]
CHROMIUM = shutil.which("chromium")
# Reads the visible sizes of the pictures from the loaded page; console messages go to stderr.
PROBE = """<script>addEventListener("load", () => {
  const widths = [...document.images].map(image => image.naturalWidth);
  document.title = "widths " + widths.join(" ");
});</script>"""


def rows_of(adapters: list[str]) -> list[dict[str, Any]]:
    curve = {"timestep": [900, 500, 100], "error": [0.0, 0.01, 0.1]}
    return [
        {
            "method": setting.method,
            "guidance_scale": setting.guidance_scale,
            "adapter": setting.adapter,
            "frechet_distance": 20.0 + i,
            "class_accuracy": 0.9,
            "gap_closed": 0.5,
            "effective_scale": 1.234,
            "denoiser_evaluations": 25.0,
            "fused": setting.adapter == "mine" if setting.adapter else None,
            "seconds_per_image": 0.01,
            "time_relative_to_none": 1.0,
            "error_by_timestep": []
            if setting.method == CFG
            else [
                {"guidance_scale": scale, **curve}
                for scale in (SCALES if setting.method == NONE else [setting.guidance_scale])
            ],
        }
        for i, setting in enumerate(settings(SCALES, COMPARED, adapters))
    ]


def report(folder: Path, adapters: list[str]) -> Path:
    shown = {setting: torch.zeros(2, 1, 8, 8, dtype=torch.uint8) for setting in settings(SCALES, COMPARED, adapters)}
    described = [{"adapter": name, "variant": "offset", "parameters": 1000, "share": 0.02} for name in adapters]
    metadata = {
        "base": "<b>base</b>",
        "num_samples": 10,
        "num_inference_steps": 25,
        "device": "cpu",
        "adapters": described,
    }
    return write_report(folder, rows_of(adapters), shown, metadata)


def test_the_table_has_a_line_per_row() -> None:
    rows = rows_of(["mine"])
    lines = table(rows).splitlines()
    assert len(lines) == 1 + len(rows)
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[:5] == ["guided,", "two", "passes", "1.5", "21.0"]
    assert "adapter" not in lines[0]
    assert [line.split()[-2] for line in lines[3:5]] == ["yes", "25"]
    assert "effective scale" in lines[0]
    assert "1.23" in lines[3].split()
    assert table(rows_of(["mine", "yours"])).splitlines()[4].split()[:3] == ["one", "pass", "yours"]


@pytest.mark.parametrize("adapters", [["mine"], ["mine", "yours"]])
def test_the_report_is_self_contained_and_its_plots_are_files_too(tmp_path: Path, adapters: list[str]) -> None:
    page = report(tmp_path, adapters).read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 1 + 1 + 4 + 2 + 2  # icon, plots of the cost, over the scale, over time, grids
    assert all(source.startswith("data:") for source in sources)
    assert "<b>base</b>" not in page
    assert "&lt;b&gt;base" in page
    assert ("one pass, yours" in page) == (len(adapters) > 1)
    assert "has a lower Frechet distance" in page or "without a lower Frechet distance" in page
    for name in (
        "pareto",
        "frechet_distance",
        "class_accuracy",
        "gap_closed",
        "effective_scale",
        "error_at_scale_1.5",
        "error_at_scale_3",
    ):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 300


def opened(page: Path, profile: Path) -> tuple[list[int], str]:
    """Open a page in a real browser; return the natural widths of its pictures and the console's output."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={profile}"]
    info = subprocess.run(
        [*command, "--enable-logging=stderr", "--dump-dom", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"<title>widths ([\d ]*)</title>", info.stdout)
    assert found, info.stderr
    return [int(width) for width in found[1].split()], "\n".join(re.findall(r".*CONSOLE.*", info.stderr))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_a_browser_shows_every_picture_without_console_messages(tmp_path: Path) -> None:
    widths, console = opened(report(tmp_path, ["mine", "yours"]), tmp_path / "profile")
    assert len(widths) == 1 + 4 + 2 + 2
    assert min(widths) > 0
    assert console == ""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_the_browser_check_detects_a_broken_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<body><img src="data:image/png;base64,AAAA"><script>console.error("wrong")</script></body>')
    widths, console = opened(page, tmp_path / "profile")
    assert widths == [0]
    assert "wrong" in console
