"""Patching a method or an attribute of an object for a time; patches nest."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

Method = Callable[..., Any]  # its arguments: the original method, the object, then the call's own


class Patch:
    """Replaces an object's method; a deep copy of the object gets its own, patched if `in_copies` is set."""

    def __init__(self, owner: Any, name: str, method: Method, own: Callable[..., Any], in_copies: bool) -> None:
        functools.update_wrapper(self, own)  # pipelines inspect signatures
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
    """Within the context, an object has another method.

    Args:
        in_copies: whether a deep copy made within the context keeps the patch.
    """
    with replaced(owner, name, Patch(owner, name, method, getattr(owner, name), in_copies)):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context, an attribute of an object has another value; the end restores the one before, patch or not.

    The value goes straight into `vars(owner)`, because a pipeline's `__setattr__` would change its configuration too.
    """
    held, had = vars(owner).get(name), name in vars(owner)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if had:
            vars(owner)[name] = held
        else:
            vars(owner).pop(name, None)  # a patch that ended out of order may have removed it already
