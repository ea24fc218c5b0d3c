from __future__ import annotations

from typing import Any

import pytest

from stages.errors import UserError
from stages.train import processes
from stages.train.processes import from_main, join_processes


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (UserError("take another output_dir"), "take another output_dir"),
        (OSError(5, "Input/output error"), "the main process failed: OSError: [Errno 5] Input/output error"),
    ],
)
def test_what_the_main_process_raises_reaches_the_others_in_a_line(
    raised: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_processes("cpu")
    sent: list[Any] = []
    monkeypatch.setattr(processes, "broadcast_object_list", lambda outcome: sent.extend(outcome) or outcome)

    def fail() -> None:
        raise raised

    with pytest.raises(type(raised)) as caught:
        from_main(fail)
    assert caught.value is raised
    ((_, refusal),) = sent
    assert isinstance(refusal, UserError)
    assert str(refusal) == told
