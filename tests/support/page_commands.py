"""The commands that a page shows: whether all that they name is there, and what they do at small size."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline import command as command_line
from stages.configuration.options import check_bounds
from stages.configuration.parsing import files_and_overrides, options, parse
from stages.generate import fleet
from stages.generate.in_process import InProcessFleet
from stages.study import multirun
from stages.study.subprocess_run import CommandResult
from tests.support.pages import ROOT, run_as_main

SEPARATORS = {"&&", "||", "|", ";"}
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*")
KEY = re.compile(r"([a-z_]\w*(?:\.\w+)*)=.*", re.DOTALL)
EXTRAS = re.compile(r"\.\[([\w,]+)\]")
TREE = ("configs/", "docker/", "pipeline/", "stages/", "tests/")
SMALL = {
    "pipeline.generate": ["num_trajectories=8", "trajectories_per_unit=4", "num_inference_steps=3", "device=cpu"],
    "pipeline.train": ["max_train_steps=2", "lr_warmup_steps=0", "train_batch_size=8", "report_to=none", "device=cpu"],
    "pipeline.sample": ["num_inference_steps=3", "device=cpu"],
    "pipeline.evaluate": ["guidance_scale=[2]", "num_samples=4", "num_inference_steps=3", "device=cpu"],
    "pipeline.export": ["num_inference_steps=3", "device=cpu"],
    "pipeline.verify": [],
}
SMALL_IF_GIVEN = {"dial_samples": "dial_samples=1"}


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """In another working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Command:
    """What a module of `pipeline` hands to `pipeline.command.run`."""

    config_class: type[Any]
    main: Callable[[Any], None]
    description: str
    multirun: Callable[[list[str]], None] | None = None
    argument: str | None = None
    dry_run: Callable[[Any], None] | None = None


@cache
def command_of(module: str) -> Command:
    found: list[Command] = []
    with patch.object(command_line, "run", lambda *given, **named: found.append(Command(*given, **named))):
        run_as_main(module, [])
    return found[0]


@cache
def modules() -> list[str]:
    """The modules that are commands."""
    paths = sorted((ROOT / "pipeline").glob("*.py"))
    return [f"pipeline.{path.stem}" for path in paths if '"__main__"' in path.read_text()]


@cache
def keys(module: str | None = None) -> dict[str, Any]:
    """The options of a command, or of all of them, with their types."""
    asked = [module] if module else modules()
    return {key: kind for name in asked for key, kind, *_ in options(command_of(name).config_class)}


def knows(key: str, module: str | None = None) -> bool:
    """Whether a command, or any of them, has an option of this name, or one that holds keys of the user's such as this."""
    known = keys(module)
    above = [key.rsplit(".", times)[0] for times in range(1, key.count(".") + 1)]
    return key in known or any("dict" in str(known.get(owner)) for owner in above)


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def extras() -> set[str]:
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))


def commands_in(text: str) -> list[list[str]]:
    """The words of each command of a shell's text."""
    commands: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        commands.append([])
        for word in shlex.split(line, comments=True):
            if word in SEPARATORS:
                commands.append([])
            else:
                commands[-1].append(word)
    return [without_environment(words) for words in commands if words]


def without_environment(words: list[str]) -> list[str]:
    while words and ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    return words


def module_in(words: list[str]) -> tuple[str | None, list[str]]:
    """The module that a command runs by `-m`, if it runs one, and the words that it is given."""
    if "-m" not in words[:-1]:
        return None, words
    place = words.index("-m")
    return words[place + 1], words[place + 2 :]


def problems(words: list[str], whole: bool = True) -> Iterator[str]:
    """What a command names that is not there.

    Args:
        whole: the command is as one would give it; else its values and the rest of its words may be left out.
    """
    if "--wrap" in words:
        for wrapped in commands_in(words[words.index("--wrap") + 1]):
            yield from problems(wrapped, whole)
        return
    if "..." in words:
        words, whole = [word for word in words if word != "..."], False
    module, given = module_in(words)
    if words[:1] == ["make"]:
        yield from (f"make {word}: no such target" for word in words[1:] if "=" not in word and word not in targets())
        return
    yield from (f"{word}: no such file" for word in words if missing(word))
    yield from (f"[{one}]: no such extra" for word in words for one in extras_in(word) if one not in extras())
    if module and not exists(module):
        yield f"{module}: no such module"
    elif module in modules() and whole:
        yield from refusals(module, given)
    else:
        command = module if module in modules() else None
        found = [match[1] for word in given if (match := KEY.fullmatch(word))]
        yield from (f"{key}: no such key of {command or 'any command'}" for key in found if not knows(key, command))


def extras_in(word: str) -> list[str]:
    match = EXTRAS.fullmatch(word)
    return match[1].split(",") if match else []


def missing(word: str) -> bool:
    """Whether a word is, or as `key=word` gives, a path of the tree at which nothing is."""
    path = word.rpartition("=")[2]
    return path.startswith(TREE) and not (ROOT / path).exists()


def exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def refusals(module: str, words: list[str]) -> Iterator[str]:
    """The line that a command ends with before it does anything, if it does."""
    if {"-h", "--help"} & set(words):
        return
    command, output = command_of(module), io.StringIO()
    combine = partial(check_each, command.config_class) if command.multirun else None
    with inside(ROOT), patch.object(sys, "argv", [module, *words]), redirect_stderr(output):
        try:
            check = check_bounds
            dry_run = check if command.dry_run else None
            command_line.run(command.config_class, check, command.description, combine, command.argument, dry_run)
        except SystemExit as ended:
            if ended.code:
                yield f"{module}: {output.getvalue().strip()}"


def check_each(config_class: type[Any], words: list[str]) -> None:
    """Check each combination of `--multirun`, without the dataset."""
    files, words = files_and_overrides(words)
    for chosen in itertools.product(*map(multirun.alternatives, words)):
        check_bounds(parse(config_class, [*(word for file in files for word in ("--config", file)), *chosen]))


def run_small(words: list[str], folder: Path) -> None:
    """Run a command in a folder, at small size, in this process; of `make`, those of its commands that are ours.

    Raises:
        AssertionError: it failed, or it is none that can be run here.
    """
    module, given = module_in(words)
    if words[0] == "make":
        for recipe in recipes(words[1:]):
            if module_in(recipe)[0] in SMALL:
                run_small(recipe, folder)
    elif words[0].endswith("python") and module in SMALL:
        run_command(module, [*given, *small(module, given)], folder)
    elif words != [".", ".venv/bin/activate"]:
        way_out = "put `<!-- not run: REASON -->` before its block"
        raise AssertionError(f"{shlex.join(words)}: cannot be run here: {way_out}")


def recipes(words: list[str]) -> list[list[str]]:
    """The commands that `make` would run."""
    make = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return commands_in(make.stdout)


def small(module: str, given: list[str]) -> list[str]:
    """The words that make a command small."""
    keys_given = {word.partition("=")[0] for word in given}
    return [*SMALL[module], *(word for key, word in SMALL_IF_GIVEN.items() if key in keys_given)]


def run_command(module: str, words: list[str], folder: Path) -> None:
    """Run a command in a folder, in this process: its workers, and the commands that it runs, are no processes."""
    output = io.StringIO()
    workers, children = (
        patch.object(fleet, "RayFleet", InProcessFleet),
        patch.object(multirun, "run_command", run_in_process),
    )
    with inside(folder), workers, children, redirect_stdout(output), redirect_stderr(output):
        try:
            run_as_main(module, words)
        except SystemExit as ended:
            if ended.code:
                raise AssertionError(f"{module} {shlex.join(words)}:\n{output.getvalue()}") from None


def run_in_process(command: str, overrides: list[str], log: Path, folder: Path) -> CommandResult:
    """The twin of what runs a command as a process."""
    run_command(f"pipeline.{command}", overrides, folder)
    return CommandResult(True, "")
