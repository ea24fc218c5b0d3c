from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.progress import progress
from stages.streams import SteadyStream, standard_error, steady

# A command that writes more to both streams than a pipe or a buffer holds, and then writes a file.
COMMAND = """
import sys, warnings
from dataclasses import dataclass
from pathlib import Path
from tqdm import tqdm
from pipeline.command import run
from stages.progress import progress
from stages.streams import standard_error

@dataclass
class Config:
    output: str

def main(config):
    with progress(3, "count é", "things") as bar:
        for _ in range(3):
            bar.update()
            tqdm.write("unit 日本", file=standard_error())
    warnings.warn("größer")
    print("日本語 " * 30_000)
    print("done ✓", flush=True)
    Path(config.output).write_text("made")
    file = open(config.output + ".second", "w")
    assert file.fileno() > 2, file.fileno()

run(Config, main, "")
"""
PLACES = {
    "no standard error": "2>&-",
    "no standard output": ">&-",
    "no streams at all": "<&- >&- 2>&-",
    "a pipe that is closed": "| true",
    "a pipe that is closed at once, for both": "2>&1 | true",
    "a standard error that is a full disk": "2>/dev/full",
    "a standard output that is a full disk": ">/dev/full",
    "a console of seven bits": "",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_command_succeeds_with_any_streams(place: str, tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND, encoding="utf-8")
    overrides = f'"{sys.executable}" "{tmp_path}/command.py" output="{tmp_path}/öutput" {PLACES[place]}'
    ended = subprocess.run(
        ["bash", "-c", f"{overrides}; exit ${{PIPESTATUS[0]}}"],
        env=os.environ | {"PYTHONPATH": str(Path.cwd()), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    caught = ended.stdout + ended.stderr
    assert (ended.returncode, b"Traceback" in caught, b"Exception ignored" in caught) == (0, False, False), caught[
        -2000:
    ]
    assert (tmp_path / "öutput").read_text() == "made"
    if place == "a console of seven bits":
        assert ended.stdout.endswith(b"done \\u2713\n")
        assert rb"warning: gr\xf6\xdfer" in ended.stderr
    if place == "a standard output that is a full disk":
        assert b"warning: standard output: No space left on device: some output is lost\n" in ended.stderr


def test_an_undecodable_argument_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND, encoding="utf-8")
    command = [sys.executable.encode(), str(tmp_path / "command.py").encode(), b"output=\xff"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, capture_output=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(b"error: output=\\udcff: not text in utf-8: ")


@pytest.fixture
def closed() -> Iterator[io.TextIOWrapper]:
    with io.TextIOWrapper(io.BytesIO()) as stream:
        stream.close()
        yield stream


def test_progress_works_without_a_stream(monkeypatch: pytest.MonkeyPatch, closed: io.TextIOWrapper) -> None:
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        assert standard_error() is standard_error()
        with progress(2, "count", "things") as bar:
            bar.update(2)
        assert not standard_error().isatty()


def test_streams_are_restored_when_a_command_fails() -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(UserError), steady():
        assert isinstance(sys.stdout, SteadyStream)
        raise UserError("no")
    assert (sys.stdout, sys.stderr) == before


def test_a_busy_stream_is_kept() -> None:
    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            if not text:
                raise BlockingIOError
            return super().write(text)

    stream = SteadyStream(busy := Busy())
    stream.write("")
    stream.write("more")
    assert (stream.refusal, busy.getvalue()) == (None, "more")
