"""What a page names in its text: files, modules, keys and other names of the code, and what it links to."""

from __future__ import annotations

import fnmatch
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.page_commands import KEY, knows, problems
from tests.support.pages import ROOT, Page, tracked

PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
ENDINGS = (".py", ".yaml", ".sh", ".json", ".toml", ".txt", ".csv", ".env")
MODULE = re.compile(r"(?:stages|pipeline|tests)(?:\.\w+)+")
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
COMMANDS = ("python -m ", "make ", "accelerate launch ", "pip install ")
PLACEHOLDER = re.compile(r"[A-Z]{3,}|N{2,}|<|>|xxx")
CODE = (".py", ".yaml", ".sh", ".toml", ".j2", ".sbatch", ".env", "Makefile", "Dockerfile")
NO_CODE = {
    "LICENSE",
    "test_pages",
    "pages",
    "page_commands",
    "page_names",
}  # what looks at pages names what is not there


@cache
def files() -> list[str]:
    return tracked()


@cache
def folders() -> set[str]:
    return {str(parent) for name in files() for parent in Path(name).parents if str(parent) != "."}


@cache
def vocabulary() -> set[str]:
    """Each word of the code, and each `name.ending`, but for the code that looks at pages."""
    code = [name for name in files() if name.endswith(CODE) and Path(name).stem not in NO_CODE]
    texts = [(ROOT / name).read_text() for name in code]
    return {word for text in texts for pattern in (r"\w+", r"[\w-]+\.\w+") for word in re.findall(pattern, text)}


def unknown(page: Page, others: frozenset[str]) -> Iterator[str]:
    """What inline code names that is not there.

    Args:
        others: names of other projects.
    """
    for line, code in page.codes:
        if code not in others:
            yield from (f"{line}: `{code}`: {problem}" for problem in problems_of(code, page, others))


def problems_of(code: str, page: Page, others: frozenset[str]) -> Iterator[str]:
    called, _, arguments = code.partition("(")
    if code.startswith(COMMANDS):
        yield from problems(split(code), whole=False)
    elif "=" in code and not arguments:
        found = [match[1] for word in split(code) if (match := KEY.fullmatch(word))]
        yield from (f"{key}: no such key of any command" for key in found if key not in others and not knows(key))
    elif MODULE.fullmatch(called):
        if not resolves(called):
            yield "no such module or attribute"
    elif is_path(code):
        if not is_there(code, page):
            yield "no such file, and none that the code writes"
    elif NAME.fullmatch(called) and not knows(called):
        yield from (f"{name}: no such name in the code" for name in called.split(".") if is_stale(name, others))


def is_stale(name: str, others: frozenset[str]) -> bool:
    return name not in others and name not in vocabulary()


def split(code: str) -> list[str]:
    try:
        return shlex.split(code)
    except ValueError:  # a quote that is none of a shell's
        return code.split()


def is_path(code: str) -> bool:
    if not PATH.fullmatch(code) or PLACEHOLDER.search(code) or code in ENDINGS:
        return False
    return code.endswith(ENDINGS) or ("/" in code and code.split("/")[0] in folders())


def is_there(code: str, page: Page) -> bool:
    """Whether it is a file or a folder, seen from the root or the page or by its last parts, or one that the code writes."""
    path = code.rstrip("/")
    if (ROOT / path).exists() or (page.path.parent / path).exists():
        return True
    if any(fnmatch.fnmatch(name, pattern) for name in (*files(), *folders()) for pattern in (path, f"*/{path}")):
        return True
    if path.split("/")[0] in folders():
        return subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, check=False).returncode == 0
    return path.rpartition("/")[2] in vocabulary()


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of the tree, or an attribute of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, part, None)
        return True
    return False


def dead_links(page: Page) -> Iterator[str]:
    """Links within the tree that lead nowhere."""
    for line, target in page.links:
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.path.parent / path if path else page.path
        if not file.exists():
            yield f"{line}: {target}: no such file"
        elif anchor and anchor not in (page if file == page.path else Page(file)).anchors:
            yield f"{line}: {target}: no such heading"
