"""The processes of a training run under `accelerate launch`, on one machine or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from stages.base.loading import first_line
from stages.errors import UserError

Result = TypeVar("Result")


def join_processes(device: str) -> PartialState:
    """Join the run's processes; without `accelerate launch`, this process is alone."""
    return PartialState(cpu=device == "cpu")


def from_main(compute: Callable[[], Result]) -> Result:
    """Return to every process what the main process computes: only its machine needs to have the output folder.

    Raises:
        UserError: in every process, what the main process raised. It raises another exception itself, and the other
            processes a UserError that names it.
    """
    outcome: list[tuple[Result | None, UserError | None]] = [(None, None)]
    failure: Exception | None = None
    if PartialState().is_main_process:
        try:
            outcome = [(compute(), None)]
        except Exception as error:  # the other processes would wait for it
            failure = error
            told = UserError(f"the main process failed: {type(error).__name__}: {first_line(error)}")
            outcome = [(None, error if isinstance(error, UserError) else told)]
    ((result, refusal),) = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if refusal is not None:
        raise refusal
    return result
