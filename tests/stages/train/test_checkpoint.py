from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from stages.errors import StorageError, UserError
from stages.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint


def test_the_newest_are_kept_and_the_latest_is_found(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(
            tmp_path, step, {"step": step, "dataset_fingerprint": "", "weights": torch.full((2,), step)}, total_limit=2
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002.pt", "step-00000010.pt"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "step-00000010.pt"
    assert find_checkpoint(tmp_path, "elsewhere.pt") == Path("elsewhere.pt")
    assert load_checkpoint(tmp_path / "step-00000010.pt")["step"] == 10
    assert torch.equal(load_checkpoint(tmp_path / "step-00000002.pt")["weights"], torch.full((2,), 2))


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".step-00000001.pt.0123abcd.tmp"
    left.write_bytes(b"half")
    assert find_checkpoint(tmp_path, "latest") is None
    save_checkpoint(tmp_path, 2, {"step": 2}, total_limit=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.pt"]


def test_a_full_disk_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk: both fail in the middle of a write."""
    state = {"dataset_fingerprint": "", "weights": torch.randn(100_000)}
    older = save_checkpoint(tmp_path, 1, state, total_limit=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="step-00000002.pt: cannot be written: File too large"):
            save_checkpoint(tmp_path, 2, state, total_limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [older]
    assert torch.equal(load_checkpoint(older)["weights"], state["weights"])


def test_an_unusable_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing.pt: no such file: name one of output_dir.s checkpoints/, or `latest`"):
        load_checkpoint(tmp_path / "missing.pt")
    for content in (b"no checkpoint", b"hi", b""):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(UserError, match="broken.pt: not readable"):
            load_checkpoint(tmp_path / "broken.pt")
    for state in ({"a": 1}, [1]):
        torch.save(state, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match="foreign.pt: not a checkpoint of this project"):
            load_checkpoint(tmp_path / "foreign.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Dangerous:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"step": Dangerous()}, tmp_path / "dangerous.pt")
    with pytest.raises(UserError, match="dangerous.pt: not readable"):
        load_checkpoint(tmp_path / "dangerous.pt")
    assert not (tmp_path / "ran").exists()


def test_going_back_to_an_older_checkpoint_drops_the_later_ones(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save_checkpoint(tmp_path, step, {"step": step}, total_limit=3)
    save_checkpoint(tmp_path, 9, {"step": 9}, total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009.pt"]
