from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.errors import UserError
from stages.train.checkpoint import load_checkpoint, save_checkpoint


def test_the_newest_are_kept_and_the_latest_is_found(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(
            tmp_path, step, {"step": step, "dataset_fingerprint": "", "weights": torch.full((2,), step)}, total_limit=2
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002.pt", "step-00000010.pt"]
    assert load_checkpoint(tmp_path, "latest")["step"] == 10
    assert torch.equal(load_checkpoint(tmp_path, str(tmp_path / "step-00000002.pt"))["weights"], torch.full((2,), 2))


def test_what_cannot_be_resumed_from_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint in"):
        load_checkpoint(tmp_path, "latest")
    with pytest.raises(UserError, match="missing.pt: not readable"):
        load_checkpoint(tmp_path, str(tmp_path / "missing.pt"))
    for content in (b"no checkpoint", b"hi", b""):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(UserError, match="broken.pt: not readable"):
            load_checkpoint(tmp_path, str(tmp_path / "broken.pt"))
    for state in ({"a": 1}, [1]):
        torch.save(state, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match="foreign.pt: not a checkpoint of this project"):
            load_checkpoint(tmp_path, str(tmp_path / "foreign.pt"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Dangerous:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"step": Dangerous()}, tmp_path / "dangerous.pt")
    with pytest.raises(UserError, match="dangerous.pt: not readable"):
        load_checkpoint(tmp_path, str(tmp_path / "dangerous.pt"))
    assert not (tmp_path / "ran").exists()
