"""Every page: its code runs, what it names is there, its links lead somewhere, and its figures are those of the committed files."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from tests.support.page_commands import commands_in, inside, problems, run_small
from tests.support.page_names import dead_links, resolves, unknown
from tests.support.pages import FIRST, IS_CHECKOUT, ROOT, Block, Page, output_of, pages
from tests.support.result_sentences import sentences

if not IS_CHECKOUT:
    pytest.skip("not all pages are here", allow_module_level=True)

PAGES = pages()
LANGUAGES = ("bash", "python", "yaml", "text", "mermaid")
LONGEST_LINE, MOST_LINES, MOST_BYTES = 120, 200, 12 * 1024
ELSEWHERE = {  # what takes long is compared by the tests that have it at hand
    "tests.support.real_shapes": "tests/support/test_real_shapes.py",
}
OF_OTHERS = frozenset({
    "key",  # of `key=value`
    "true_cfg_scale",  # of pipelines
    "max_sequence_length",  # of SD3's pipeline
    "fullgraph",  # of torch.compile
    "Accelerator",  # of accelerate
    "lora_conversion_utils.py",  # of diffusers
})  # fmt: skip


class Workshop:
    """A folder in which the pages are followed one after the other: what one makes is there for the next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left = list(PAGES)
        for name in ("configs", "docker", "stages", "tests"):
            (folder / name).symlink_to(ROOT / name)

    def follow(self, name: str) -> None:
        """Follow a page, and all before it that were not."""
        while name in self.left:
            follow(Page(ROOT / self.left.pop(0)), self.folder)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def follow(page: Page, folder: Path) -> None:
    """Run each block of a page that can run, in their order."""
    for block in page.blocks:
        if block.not_run:
            continue
        if block.language == "bash":
            for words in commands_in(block.text):
                run_small(words, folder)
        if block.language == "python":
            with inside(folder):
                exec(compile(block.text, f"{page.path}:{block.line}", "exec"), {"__name__": "page"})


def refuse(name: str, problems: Iterable[str]) -> None:
    """Fail with a line for each problem of a page."""
    if found := [f"{name}:{problem}" for problem in problems]:
        pytest.fail("\n".join(found), pytrace=False)


def runs(page: Page) -> bool:
    return any(block.language in ("bash", "python") and not block.not_run for block in page.blocks)


def wrong(block: Block) -> list[str]:
    """What a block names that is not there."""
    if block.language == "bash":
        return [problem for words in commands_in(block.text) for problem in problems(words)]
    if block.language == "python":
        return [f"{name}: no such name" for name in imported(block.text) if not resolves(name)]
    if block.language == "yaml":
        yaml.safe_load(block.text)
    return [] if block.text.strip() else ["empty"]


def imported(text: str) -> list[str]:
    """The names that Python code imports from this project."""
    froms = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module]
    names = [f"{node.module}.{alias.name}" for node in froms for alias in node.names]
    return [name for name in names if name.startswith(("stages.", "pipeline.", "tests."))]


@pytest.mark.parametrize("name", [name for name in PAGES if runs(Page(ROOT / name))])
def test_its_code_runs(name: str, workshop: Workshop) -> None:
    workshop.follow(name)


@pytest.mark.parametrize("name", PAGES)
def test_what_its_code_names_is_there(name: str) -> None:
    page = Page(ROOT / name)
    blocks = [block for block in page.blocks if block.language not in LANGUAGES]
    unnamed = [f"{b.line}: of language {b.language!r}, not {', '.join(LANGUAGES)}" for b in blocks]
    named = [f"{b.line}: {problem}" for b in page.blocks for problem in wrong(b)]
    refuse(name, unnamed + named)


@pytest.mark.parametrize("name", PAGES)
def test_its_comments_are_understood(name: str) -> None:
    assert Page(ROOT / name).stray_comments == 0, "`not run: REASON` before a block, or `written by: COMMAND` and `end`"


@pytest.mark.parametrize("name", PAGES)
def test_what_its_text_names_is_there(name: str) -> None:
    refuse(name, unknown(Page(ROOT / name), OF_OTHERS))


@pytest.mark.parametrize("name", PAGES)
def test_its_links_lead_somewhere(name: str) -> None:
    refuse(name, dead_links(Page(ROOT / name)))


@pytest.mark.parametrize("name", PAGES)
def test_its_figures_are_those_of_the_commands_that_write_them(name: str) -> None:
    for part in Page(ROOT / name).written:
        if part.command.split()[2] not in ELSEWHERE:
            way_out = "`python -m tests.support.pages` writes it anew"
            assert part.text == output_of(part.command), f"{name}:{part.line}: {way_out}"


@pytest.mark.parametrize("name", PAGES)
def test_its_sentences_tell_the_figures_of_the_committed_files(name: str) -> None:
    refuse(name, missing((ROOT / name).read_text(), [sentence for page, sentence in sentences() if page == name]))


def missing(text: str, held: list[str]) -> list[str]:
    """The parts of sentences that a text does not have, wherever its lines break."""
    flat = " ".join(text.split())
    return [f" not there: {sentence}" for sentence in held if sentence not in flat]


@pytest.mark.parametrize("name", PAGES)
def test_its_lines_are_short(name: str) -> None:
    refuse(name, (f"{line}: longer than {LONGEST_LINE}" for line in long_lines(Page(ROOT / name))))


def long_lines(page: Page) -> list[int]:
    """The numbers of lines that are too long and neither a row of a table, nor a line that is one link."""
    lines = enumerate(page.text.splitlines(), 1)
    return [n for n, line in lines if len(line) > LONGEST_LINE and not line.startswith("|") and "](" not in line]


def test_the_first_page_is_one_sitting() -> None:
    text = (ROOT / FIRST).read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.encode()) < MOST_BYTES
