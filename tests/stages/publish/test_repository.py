"""Uploads in several commits."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import ChangedError
from stages.publish import repository
from stages.publish.repository import MODEL, LocalFile, Repository
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
