from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.verify import VerifyConfig, main
from stages.errors import UserError


def test_what_is_in_a_dataset_is_told(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(VerifyConfig(str(damaged)))
    told = capsys.readouterr().out
    assert "12 trajectories, 48 records, 4 shards" in told
    assert told.splitlines()[-1] == "whole: nothing is missing or damaged"
    assert (damaged / "verification.json").exists()


def test_every_problem_is_listed(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted((damaged / "shards").iterdir())
    shards[0].unlink()
    shards[1].write_bytes(b"")
    with pytest.raises(UserError, match="2 problem"):
        main(VerifyConfig(str(damaged)))
    told = capsys.readouterr().out
    assert f"shards/{shards[0].name}: expected" in told
    assert f"shards/{shards[1].name}: expected" in told
