"""Scales that a thread or task opens around its calls, and that precede the scale of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from stages.adapters.attachment import Context
from stages.adapters.guidance import ScaleSchedule

ScaleOverride = Context | ScaleSchedule

# The open overrides of this thread or task with their adapters, innermost last.
OPEN: ContextVar[tuple[tuple[Any, ScaleOverride], ...]] = ContextVar("open", default=())


@contextmanager
def overriding(adapter: Any, override: ScaleOverride) -> Iterator[None]:
    """Open an override of an adapter's scale."""
    before = OPEN.get()
    OPEN.set((*before, (adapter, override)))
    try:
        yield
    finally:
        OPEN.set(before)


def innermost_override(adapter: Any) -> ScaleOverride | None:
    """Return the adapter's innermost override in this thread or task; None if there is none."""
    return next((override for opened_of, override in reversed(OPEN.get()) if opened_of is adapter), None)


def innermost_context(adapter: Any) -> Context | None:
    """Return the adapter's innermost override that is not a schedule; None if there is none."""
    overrides = (override for opened_of, override in reversed(OPEN.get()) if opened_of is adapter)
    return next((override for override in overrides if isinstance(override, Context)), None)
