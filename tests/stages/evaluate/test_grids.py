"""The slider of `report.html` over the measured scales, in a real browser and from a file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page, sync_playwright

from stages.evaluate.comparisons import settings
from stages.evaluate.report import write_report
from tests.stages.evaluate.test_report import SCALES, report, rows_of

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")


@contextmanager
def opened(path: Path, scripts: bool = True) -> Iterator[Page]:
    """The page in a browser; it asks for nothing but itself."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(java_script_enabled=scripts)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        yield page
        browser.close()
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


def shown(page: Page) -> list[str | None]:
    """The scales whose grids are visible."""
    return [s.get_attribute("data-scale") for s in page.query_selector_all(".at-scale") if s.is_visible()]


def test_the_grid_follows_the_slider_by_keyboard(tmp_path: Path) -> None:
    assert SCALES == [1.5, 3.0]
    with opened(report(tmp_path, ["mine"])) as page:
        assert shown(page) == ["1.5"]
        page.get_by_label("Guidance scale").focus()
        for key, scale in (
            ("ArrowRight", "3"),
            ("Home", "1.5"),
            ("End", "3"),
            ("ArrowRight", "3"),
            ("ArrowLeft", "1.5"),
        ):
            page.keyboard.press(key)
            assert shown(page) == [scale]
            assert page.inner_text("#dial output") == scale
            assert page.get_attribute("#scale", "aria-valuetext") == scale
        page.emulate_media(media="print")
        assert shown(page) == ["1.5", "3"]


def test_without_javascript_every_grid_shows(tmp_path: Path) -> None:
    with opened(report(tmp_path, ["mine"]), scripts=False) as page:
        assert shown(page) == ["1.5", "3"]
        assert not page.is_visible("#dial")


def test_one_scale_needs_no_slider(tmp_path: Path) -> None:
    compared = settings([2.0], adapters=["mine"])
    rows = [row for row in rows_of(["mine"]) if row["guidance_scale"] in (1.0, 3.0)]
    pictures = {setting: torch.zeros(2, 1, 8, 8, dtype=torch.uint8) for setting in compared}
    metadata = {"base": "base", "num_samples": 10, "num_inference_steps": 25, "device": "cpu", "adapters": []}
    for row in rows:
        row["guidance_scale"] = min(row["guidance_scale"], 2.0)
        for curve in row["error_by_timestep"]:
            curve["guidance_scale"] = 2.0
    with opened(write_report(tmp_path, rows, pictures, metadata)) as page:
        assert shown(page) == ["2"]
        assert page.query_selector("#dial") is None
