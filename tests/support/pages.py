"""A page in Markdown: its blocks of code, what it names and links to, and the parts that a command writes.

python -m tests.support.pages    writes those parts anew, in every page that git knows
"""

from __future__ import annotations

import io
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

from markdown_it import MarkdownIt
from markdown_it.token import Token

FIRST = "README.md"
ROOT = Path(__file__).parents[2]
IS_CHECKOUT = (ROOT / ".git").exists()  # an image is none, and has not all pages
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
WRITTEN = re.compile(r"^<!-- written by: (.+?) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """Code between fences.

    Attributes:
        not_run: why it cannot be run in a test, where the comment before it says so.
    """

    line: int
    language: str
    text: str
    not_run: str | None = None


@dataclass(frozen=True)
class Written:
    """A part of a page that a command writes: all between its two comments."""

    line: int
    command: str
    text: str


class Page:
    """A page, read from its file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text()
        self.tokens = MARKDOWN.parse(self.text)

    @cached_property
    def blocks(self) -> list[Block]:
        return list(self._blocks())

    def _blocks(self) -> Iterator[Block]:
        not_run = None
        for token in self.tokens:
            if token.type in ("fence", "code_block"):
                yield Block(line_of(token), token.info.strip(), token.content, not_run)
            comment = NOT_RUN.fullmatch(token.content.strip()) if token.type == "html_block" else None
            not_run = comment[1] if comment else None

    @property
    def stray_comments(self) -> int:
        """How many comments neither tell why the next block is not run, nor enclose a part that a command writes."""
        comments = sum(token.type == "html_block" for token in self.tokens)
        return comments - sum(block.not_run is not None for block in self.blocks) - 2 * len(self.written)

    @cached_property
    def written(self) -> list[Written]:
        found = WRITTEN.finditer(self.text)
        return [Written(self.text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in found]

    @cached_property
    def codes(self) -> list[tuple[int, str]]:
        """Inline code, with the line that its paragraph begins in."""
        return [(line, token.content) for line, token in self._inline() if token.type == "code_inline"]

    @cached_property
    def links(self) -> list[tuple[int, str]]:
        """Targets of links and images, with the line that their paragraph begins in."""
        targets = ((line, token.attrGet("href") or token.attrGet("src")) for line, token in self._inline())
        return [(line, str(target)) for line, target in targets if target]

    def _inline(self) -> Iterator[tuple[int, Token]]:
        line = 0
        for token in self.tokens:
            line = line_of(token) if token.map else line
            yield from ((line, child) for child in token.children or [])

    @cached_property
    def anchors(self) -> set[str]:
        """The headings' anchors, by GitHub's rule."""
        anchors: set[str] = set()
        times: Counter[str] = Counter()
        for opening, heading in zip(self.tokens, self.tokens[1:], strict=False):
            if opening.type == "heading_open":
                slug = slug_of(plain(heading))
                anchors.add(f"{slug}-{times[slug]}" if times[slug] else slug)
                times[slug] += 1
        return anchors


def line_of(token: Token) -> int:
    assert token.map
    return token.map[0] + 1


def plain(heading: Token) -> str:
    """A heading's text without its marks."""
    return "".join(child.content for child in heading.children or [] if child.type in ("text", "code_inline"))


def slug_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def tracked(pattern: str = "") -> list[str]:
    """The names, below the root, of the files that git knows or will know."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *([pattern] if pattern else [])]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def pages() -> list[str]:
    """The names of all pages but the log of changes, in the order in which the first page links to them."""
    names = [name for name in tracked("*.md") if Path(name).name in ("README.md", "CONTRIBUTING.md")]
    targets = [target for _, target in Page(ROOT / FIRST).links]
    return sorted(
        names, key=lambda name: (name != FIRST, targets.index(name) if name in targets else len(targets), name)
    )


def output_of(command: str) -> str:
    """What a command `python -m MODULE WORDS` prints, run in this process."""
    python, option, module, *words = shlex.split(command)
    assert (python, option) == ("python", "-m"), f"{command}: not `python -m MODULE`"
    printed = io.StringIO()
    with redirect_stdout(printed):
        run_as_main(module, words)
    return printed.getvalue()


def run_as_main(module: str, words: list[str]) -> None:
    """Run a module in this process, as `python -m` does."""
    with patch.object(sys, "argv", [module, *words]), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported before
        runpy.run_module(module, run_name="__main__")


def rewrite(path: Path) -> None:
    """Have each part of a page that a command writes written by it."""

    def written(match: re.Match[str]) -> str:
        return f"<!-- written by: {match[1]} -->\n{output_of(match[1])}<!-- end -->"

    path.write_text(WRITTEN.sub(written, path.read_text()))


if __name__ == "__main__":
    for name in pages():
        rewrite(ROOT / name)
