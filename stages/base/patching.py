"""Patching a method of an object for a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

Method = Callable[..., Any]  # is given the object's own method, the object, and the arguments


class Patch:
    """In the place of an object's method. A deep copy of the object has its own, patched too where that is asked for."""

    def __init__(self, owner: Any, name: str, method: Method, own: Callable[..., Any], in_copies: bool) -> None:
        functools.update_wrapper(self, own)  # pipelines look at signatures
        self.owner, self.name, self.method, self.own, self.in_copies = owner, name, method, own, in_copies

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(self.own, self.owner, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self.owner), self.owner)
        is_patch = isinstance(self.own, Patch)
        own = copy.deepcopy(self.own, memo) if is_patch else MethodType(getattr(type(owner), self.name), owner)
        return Patch(owner, self.name, self.method, own, True) if self.in_copies else own


@contextmanager
def patched(owner: Any, name: str, method: Method, in_copies: bool = False) -> Iterator[None]:
    """Within it, an object has another method, and afterwards what it had, a patch of someone else's too.

    Args:
        in_copies: whether a deep copy that is made within has it too, for good.
    """
    held, had = vars(owner).get(name), name in vars(owner)
    setattr(owner, name, Patch(owner, name, method, getattr(owner, name), in_copies))
    try:
        yield
    finally:
        if had:
            setattr(owner, name, held)
        else:
            vars(owner).pop(name, None)  # or whoever patched it since has put it back already
