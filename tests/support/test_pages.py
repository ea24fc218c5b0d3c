"""What is wrong on a page is found: made-up pages with one fault each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.page_commands import commands_in, problems, run_small
from tests.support.page_names import dead_links, unknown
from tests.support.pages import IS_CHECKOUT, Page, output_of, rewrite, slug_of

if not IS_CHECKOUT:
    pytest.skip("git does not tell here what is there", allow_module_level=True)

from tests.test_pages import follow, imported, long_lines, missing, wrong

TRAIN = "python -m pipeline.train --config configs/train/lora.yaml data_dir=data output_dir=run"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "README.md"


def page_of(path: Path, text: str) -> Page:
    path.write_text(text)
    return Page(path)


def problems_of(command: str, whole: bool = True) -> list[str]:
    return [problem for words in commands_in(command) for problem in problems(words, whole)]


@pytest.mark.parametrize(
    "command",
    [
        f"OMP_NUM_THREADS=1 {TRAIN} max_train_steps=3 \\\n    adapter.rank=2  # small",
        "make install && . .venv/bin/activate",
        "make python=3.12 install",
        "pip install '.[generate,text]'",
        "python -m pipeline.generate --help",
        "python -m pipeline.generate --config configs/generate/mnist_dit.yaml output_dir=data teacher.call.clean=1",
        "python -m pipeline.train --multirun data_dir=data output_dir=runs adapter.variant=offset,lora seed=0,1",
        "python -m pipeline.study configs/study/claims.yaml output_dir=run",
        "accelerate launch -m pipeline.train ...",
        "sbatch --gpus=1 --wrap 'python -m pipeline.verify data_dir=data'",
        "docker compose --file docker/compose.yaml run --build --rm generate",
    ],
)
def test_a_command_that_names_what_is_there_is_right(command: str) -> None:
    assert problems_of(command) == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (f"{TRAIN} max_train_step=3", "max_train_step: no such key"),
        (f"{TRAIN} max_train_steps=0", "max_train_steps=0: at least 1"),
        (f"{TRAIN} max_train_steps=many", "max_train_steps=many"),
        ("python -m pipeline.train data_dir=data", "output_dir: not given"),
        (TRAIN.replace("lora.yaml", "dora.yaml"), "configs/train/dora.yaml: no such file"),
        ("python -m pipeline.train --multirun data_dir=d output_dir=o seed=0,a", "seed=a"),
        ("python -m pipeline.tune data_dir=data", "pipeline.tune: no such module"),
        ("python -m tests.benchmarks.gone", "tests.benchmarks.gone: no such module"),
        ("python -m tests.benchmarks.scale and=1", "and: no such key of any command"),
        ("make dinner", "make dinner: no such target"),
        ("pip install '.[generate,cake]'", "[cake]: no such extra"),
        ("sbatch --wrap 'python -m pipeline.verify dir=data'", "dir: no such key"),
        ("docker compose --file docker/decompose.yaml run generate", "docker/decompose.yaml: no such file"),
    ],
)
def test_a_command_that_names_what_is_not_there_is_found(command: str, problem: str) -> None:
    assert any(problem in found for found in problems_of(command))


def test_of_a_command_in_the_text_the_keys_alone_are_looked_at() -> None:
    assert problems_of("python -m pipeline.train max_train_steps=N", whole=False) == []
    (found,) = problems_of("python -m pipeline.train max_steps=N", whole=False)
    assert found == "max_steps: no such key of pipeline.train"


@pytest.mark.parametrize(
    "code",
    [
        "stages/records", "configs/train/*.yaml", "stages/generate/driver.py", "generate/driver.py", "driver.py",
        "training.json", "runs/sweep/multirun.json", "commits/NNNNN.json", "docker/secrets.env", "adapter.sites", "seed=1",
        "adapter.hidden_size=32 seed=0", "teacher.call.NAME=...", "stages.records.dataset.Dataset", "GuidanceAdapter.fuse",
        "adapter.fuse(guidance_scale=2)", "stages.records.dataset.Dataset(data_dir, snapshot=FINGERPRINT)", "make test",
        "w - 1", "PYTHONPATH=.", "u + w (c - u)",
    ],
)  # fmt: skip
def test_what_is_there_may_be_named(code: str, page: Path) -> None:
    assert list(unknown(page_of(page, f"It is `{code}`.\n"), frozenset())) == []


@pytest.mark.parametrize(
    "code",
    [
        "stages/rekords", "configs/train/dora.yaml", "stages/generate/drover.py", "drover.py", "trainink.json",
        "runs/sweep/multirunn.json", "docker/sekrets.env", "adapter.sights", "sead=1", "adapter.hidden_sise=32 seed=0",
        "taecher.call.NAME=...", "stages.records.dataset.Datacet", "GuidanceAdapter.fuze", "adapter.fuze(guidance_scale=2)",
        "stages.records.datacet.Dataset()", "make toast", "no_such_name_here", "python -m pipeline.train sead=0",
    ],
)  # fmt: skip
def test_what_is_not_there_is_found(code: str, page: Path) -> None:
    (found,) = unknown(page_of(page, f"# Page\n\nIt is\n`{code}`.\n"), frozenset())
    assert found.startswith(f"3: `{code}`")


def test_names_of_others_may_be_named(page: Path) -> None:
    assert not list(
        unknown(page_of(page, "`Fremd`, `Fremd.call` and `fremd=1`"), frozenset({"Fremd", "call", "fremd"}))
    )


def test_links_are_followed(page: Path) -> None:
    (page.parent / "other.md").write_text("# Some `code`, and more\n\n## Twice\n\n## Twice\n")
    right = ["other.md", "other.md#some-code-and-more", "other.md#twice-1", "#here", "https://example.org/none"]
    wrong = ["none.md", "other.md#some-code", "other.md#twice-2", "#there"]
    text = "# Here\n\n" + "\n\n".join(f"[text]({target})" for target in right + wrong) + "\n\n![a](none.png)\n"
    found = list(dead_links(page_of(page, text)))
    assert [line.split(": ")[1] for line in found] == [*wrong, "none.png"]


def test_anchors_are_those_of_github() -> None:
    assert slug_of("What happens to it, and what's left") == "what-happens-to-it-and-whats-left"
    assert slug_of("`full` & lora_rank – 2x") == "full--lora_rank--2x"


def test_a_block_may_say_why_it_is_not_run(page: Path) -> None:
    text = (
        "<!-- not run: no GPU -->\n```bash\na\n```\n\n<!-- not run: a day -->\n\n```bash\nb\n```\n\n```python\nc\n```\n"
    )
    found = [(block.line, block.language, block.text, block.not_run) for block in page_of(page, text).blocks]
    assert found == [(2, "bash", "a\n", "no GPU"), (8, "bash", "b\n", "a day"), (12, "python", "c\n", None)]


def test_a_reason_holds_for_the_next_block_only(page: Path) -> None:
    text = "<!-- not run: no GPU -->\n\nOther text.\n\n```bash\na\n```\n"
    assert page_of(page, text).blocks[0].not_run is None


@pytest.mark.parametrize(
    ("text", "stray"),
    [
        ("<!-- not run: a day -->\n\n```bash\na\n```\n\n<!-- written by: python -m this -->\nb\n<!-- end -->\n", 0),
        ("<!-- not run -->\n\n```bash\na\n```\n", 1),
        ("<!-- not run: a day -->\n\nText.\n\n```bash\na\n```\n", 1),
        ("<!-- written by: python -m this -->\nb\n", 1),
        ("<!-- writen by: python -m this -->\nb\n<!-- end -->\n", 2),
    ],
)
def test_a_comment_that_marks_nothing_is_found(text: str, stray: int, page: Path) -> None:
    assert page_of(page, text).stray_comments == stray


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nassert 1 == 2\n```\n", AssertionError),
        ("```python\nfrom stages.records import nothing\n```\n", ImportError),
        ("```bash\nrm file\n```\n", AssertionError),
        ("```bash\npython -m pipeline.verify data_dir=nowhere\n```\n", AssertionError),
        ("```bash\npython -m tests.benchmarks.scale\n```\n", AssertionError),
    ],
)
def test_code_that_fails_is_found(text: str, error: type[Exception], page: Path) -> None:
    with pytest.raises(error):
        follow(page_of(page, text), page.parent)
    follow(page_of(page, f"<!-- not run: it fails -->\n\n{text}"), page.parent)


def test_commands_run_in_the_folder_at_small_size(tmp_path: Path, shared_dataset: Path) -> None:
    (tmp_path / "data").symlink_to(shared_dataset)
    train = (
        "python -m pipeline.train data_dir=data output_dir=runs max_train_steps=2000 --multirun seed=0,1 adapter.rank=2"
    )
    run_small(commands_in(train)[0], tmp_path)
    rows = json.loads((tmp_path / "runs" / "multirun.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["seed=0", "seed=1"]
    assert json.loads((tmp_path / "runs" / "seed=0" / "training.json").read_text())["steps"] == 2


def test_what_a_block_imports_is_looked_at(page: Path) -> None:
    text = "```python\nfrom stages.records.dataset import Dataset, Datacet\n```\n"
    assert imported("import torch\nfrom stages.records import dataset") == ["stages.records.dataset"]
    assert wrong(page_of(page, text).blocks[0]) == ["stages.records.dataset.Datacet: no such name"]


def test_a_figure_that_its_command_does_not_print_is_found_and_written_anew(page: Path) -> None:
    command = "python -m tests.pipelines_zoo.table"
    (before,) = page_of(page, f"Before\n<!-- written by: {command} -->\nOf 99\n<!-- end -->\nAfter\n").written
    assert (before.line, before.command) == (2, command)
    assert before.text == "Of 99\n" != output_of(command)
    rewrite(page)
    assert Page(page).written[0].text == output_of(command)
    assert page.read_text().startswith(f"Before\n<!-- written by: {command} -->\n")
    assert page.read_text().endswith("<!-- end -->\nAfter\n")


def test_a_figure_in_a_sentence_that_is_another_is_found() -> None:
    assert missing("It takes 3.2 GB\nof memory.", ["3.2 GB of memory", "3.3 GB of memory"]) == [
        " not there: 3.3 GB of memory"
    ]


def test_long_lines_are_found_but_for_tables_and_links(page: Path) -> None:
    long = "word " * 30
    assert long_lines(page_of(page, f"{long}\n| {long} |\n[a](b) {long}\nshort\n")) == [1]
