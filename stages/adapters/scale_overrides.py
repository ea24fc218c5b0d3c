"""Scales that a thread or task has opened around its calls: they come before the scale that a call names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from stages.adapters.attachment import Context
from stages.adapters.guidance import ScaleSchedule

ScaleOverride = Context | ScaleSchedule

# What is open in this thread or task, the innermost last, each with the adapter that it is asked of.
OPEN: ContextVar[tuple[tuple[Any, ScaleOverride], ...]] = ContextVar("open", default=())


@contextmanager
def overriding(adapter: Any, override: ScaleOverride) -> Iterator[None]:
    """Within it, an override is the innermost of an adapter."""
    before = OPEN.get()
    OPEN.set((*before, (adapter, override)))
    try:
        yield
    finally:
        OPEN.set(before)


def innermost_override(adapter: Any) -> ScaleOverride | None:
    """The innermost override of an adapter in this thread or task, if any is open."""
    return next((override for opened_of, override in reversed(OPEN.get()) if opened_of is adapter), None)


def innermost_context(adapter: Any) -> Context | None:
    """The innermost of an adapter's overrides that is no schedule."""
    overrides = (override for opened_of, override in reversed(OPEN.get()) if opened_of is adapter)
    return next((override for override in overrides if isinstance(override, Context)), None)
