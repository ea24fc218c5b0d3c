"""Uploads in several commits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import RepoCard

from stages.errors import ChangedError, UserError
from stages.publish import repository
from stages.publish.repository import DATASET, MODEL, LocalFile, Repository, check_card
from tests.support.hub import WRITER, Hub


def test_files_are_sent_in_batches_and_only_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.point_to(monkeypatch, WRITER)
    monkeypatch.setattr(repository, "FILES_PER_COMMIT", 2)
    for number in range(5):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]))
    files = {path.name: LocalFile.of(path) for path in sorted(tmp_path.iterdir())}
    assert Repository("someone/some", MODEL).upload(files, "files") == 5
    repo = hub.repos["someone/some"]
    assert repo.messages[1:] == ["2 files", "2 files", "1 files"]
    (tmp_path / "3.tar").write_bytes(b"another")
    with pytest.raises(ChangedError, match=r"3\.tar: has changed"):
        files["3.tar"].check()
    files["3.tar"] = LocalFile.of(tmp_path / "3.tar")
    again = Repository("someone/some", MODEL)
    assert list(again.missing(files)) == ["3.tar"]
    assert again.upload(files, "files") == 1
    again.commit({}, {"README.md": b"text"}, "last", leave_out={"0.tar"})
    assert set(repo.files) == {".gitattributes", "README.md", "1.tar", "2.tar", "3.tar", "4.tar"}
    assert again.head == repo.branches["main"]


@pytest.mark.parametrize(
    ("files", "written"),
    [
        ({"README.md": b"# My page\n"}, True),
        ({"README.md": b"---\nlicense: mit\n---\n\nMy page\n---\n"}, True),
        ({"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"x", ".gitattributes": b"x"}, False),
        ({"README.md": b"---\r\nlicense: mit\r\n---"}, False),
        ({"README.md": b"\n"}, False),
        ({".gitattributes": b"x"}, False),
    ],
)
def test_a_page_that_somebody_wrote_is_not_replaced(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], written: bool
) -> None:
    hub.point_to(monkeypatch, WRITER)
    hub.add("someone/some", files)
    repo = Repository("someone/some", MODEL)
    if not written:
        repo.check_own("an adapter")
        return
    with pytest.raises(UserError, match=r"someone/some: holds somebody's README.md, and is no repository of an adapt"):
        repo.check_own("an adapter")


def test_an_upload_says_who_can_read_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.point_to(monkeypatch, WRITER)
    Repository("someone/some", DATASET).announce()
    Repository("someone/mine", MODEL, private=True).announce()
    assert capsys.readouterr().err.splitlines() == [
        f"upload to {hub.url}/datasets/someone/some, branch main, public: everyone can read it",
        f"upload to {hub.url}/someone/mine, branch main, private",
    ]


@pytest.mark.parametrize(
    ("answer", "told"),
    [(b"busy", "busy"), (b'{"errors": [{"message": "a\\nb"}, {"message": "c"}]}', "a b; c"), (b"[]", "[]")],
)
def test_a_refused_header_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch, answer: bytes, told: str) -> None:
    hub.point_to(monkeypatch, WRITER)
    monkeypatch.setattr(RepoCard, "validate", raises(ValueError(answer.decode())))
    with pytest.raises(UserError) as found:
        check_card(b"text", "someone/some", MODEL)
    refused = f"{hub.url}/someone/some: the hub refuses the header of the card: {told}; nothing was uploaded"
    assert str(found.value) == refused


def raises(error: Exception) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call
