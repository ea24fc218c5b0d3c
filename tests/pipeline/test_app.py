"""The app as a user runs it: the real command, and a real browser that moves the slider."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

import pipeline.app
from stages.app.config import AppConfig
from stages.errors import UsageError, UserError

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
STEPS, PATIENCE = 4, 240_000  # milliseconds, on a machine that does much else
# The command, which tells of every connection that it opens and of every name that it looks up.
WATCHED = """
import runpy, sys

def tell(event, arguments):
    place = {"socket.connect": 1, "socket.getaddrinfo": 0}.get(event)
    if place is not None:
        print("REACHES", arguments[place], file=sys.stderr, flush=True)

sys.addaudithook(tell)
runpy.run_module("pipeline.app", run_name="__main__")
"""


@pytest.fixture(scope="module")
def address(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running app; Ctrl-C ends it without an error, and it reached no other machine."""
    options = [f"adapter_dir={tiny_adapter}", "port=0", f"num_inference_steps={STEPS}", "device=cpu"]
    log = tmp_path_factory.mktemp("app") / "stderr"
    with log.open("w") as stderr:
        command = [sys.executable, "-c", WATCHED, *options]
        app = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert app.stdout is not None
    line = app.stdout.readline()
    found = re.match(r"(http://127\.0\.0\.1:\d+): ", line)
    try:
        assert found, line + log.read_text()
        yield found[1]
    finally:
        app.send_signal(signal.SIGINT)
        status = app.wait(timeout=60)
    told = log.read_text()
    reached = [line for line in told.splitlines() if line.startswith("REACHES") and "127.0.0.1" not in line]
    assert (status, reached) == (0, []), told
    assert "Traceback" not in told


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    """The opened page; it asked no other machine for anything, and its console stayed empty."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(PATIENCE)
        asked: list[str] = []
        console: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: console.append(message.text))
        page.on("pageerror", lambda error: console.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#one_pass img")
        yield page
        browser.close()
    assert asked
    assert [url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))] == []
    assert console == []


def pictures(page: Page) -> dict[str, str | None]:
    return {method: page.get_attribute(f"#{method} img", "src") for method in ("none", "cfg", "one_pass")}


def wait_for_new(page: Page, method: str, before: dict[str, str | None]) -> None:
    changed = "([method, before]) => document.querySelector(`#${method} img`).src !== before"
    page.wait_for_function(changed, arg=[method, before[method]])


def evaluations(page: Page) -> list[str]:
    return [page.inner_text(f"#{method} .evaluations") for method in ("none", "cfg", "one_pass")]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_pictures_follow_the_slider_the_seed_and_the_class(page: Page) -> None:
    before = pictures(page)
    assert len(set(before.values())) == 3
    assert evaluations(page) == [str(STEPS), str(2 * STEPS), str(STEPS)]
    page.focus("#scale input[type=range]")
    page.keyboard.press("ArrowRight")
    for method in ("cfg", "one_pass"):
        wait_for_new(page, method, before)
    assert pictures(page)["none"] == before["none"]
    page.keyboard.press("End")
    page.wait_for_function("() => document.querySelector('#note').innerText.includes('outside the trained scales')")
    page.click("#another")
    wait_for_new(page, "none", before)
    before = pictures(page)
    page.click("#shown input")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    wait_for_new(page, "none", before)
    assert evaluations(page) == [str(STEPS), str(2 * STEPS), str(STEPS)]
    assert all(int(page.inner_text(f"#{method} .milliseconds")) > 0 for method in before)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_while_the_slider_moves_only_its_last_position_waits(page: Page) -> None:
    before = pictures(page)
    page.focus("#scale input[type=range]")
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/queue/join") else None)
    wait_for_new(page, "cfg", before)
    page.wait_for_timeout(200)
    assert len(asked) <= 2


def test_a_machine_without_gradio_is_told_which_extra_to_install(
    tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("stages.app.page", "stages.app.server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("stages.app.page", raising=False)
    monkeypatch.delattr("stages.app.server", raising=False)
    with pytest.raises(UserError, match=r"gradio is not installed: pip install '\.\[app\]'"):
        pipeline.app.main(AppConfig(str(tiny_adapter)))


def test_what_is_no_adapter_and_what_is_no_port_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an adapter"):
        pipeline.app.main(AppConfig(str(tmp_path), port=0))
    with pytest.raises(UsageError, match="port=65536: at most 65535"):
        pipeline.app.main(AppConfig(str(tmp_path), port=65536))


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed here")
def test_make_app_asks_for_the_demo_first(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", f"DEMO={tmp_path}", "--assume-old=install", "app"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == f"error: {tmp_path}/adapter: no adapter there: run make demo first"
