from __future__ import annotations

import copy
import inspect
from typing import Any

from diffusers import DDIMScheduler

from stages.base.patching import patched, replaced


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, amount: int = 1) -> int:
        self.count += amount
        return self.count


def doubled(own: Any, counter: Counter, amount: int = 1) -> int:
    return int(own(2 * amount))


def test_a_method_is_replaced_within_the_context_and_keeps_its_signature() -> None:
    counter = Counter()
    with patched(counter, "add", doubled):
        assert counter.add(3) == 6
        assert list(inspect.signature(counter.add).parameters) == ["amount"]
        with patched(counter, "add", doubled):
            assert counter.add(1) == 6 + 4
        assert counter.add(1) == 12
    assert counter.add(1) == 13
    assert "add" not in vars(counter)


def test_an_earlier_patch_is_restored_afterwards() -> None:
    counter = Counter()
    theirs = counter.add = lambda amount=1: -1  # type: ignore[method-assign,assignment]
    with patched(counter, "add", doubled):
        assert counter.add() == -1
    assert counter.add is theirs


def test_an_attribute_is_restored_without_its_objects_setter() -> None:
    class Guarded(Counter):
        def __setattr__(self, name: str, value: object) -> None:
            assert name == "count", name
            super().__setattr__(name, value)

    guarded = Guarded()
    with replaced(guarded, "checker", None), replaced(guarded, "count", 7):
        assert vars(guarded) == {"count": 7, "checker": None}
        with replaced(guarded, "count", 8):
            assert guarded.count == 8
        assert guarded.count == 7
    assert vars(guarded) == {"count": 0}


def test_a_deep_copy_uses_its_own_counter_patched_or_not() -> None:
    for in_copies, expected in ((False, 1), (True, 2)):
        counter = Counter()
        with patched(counter, "add", doubled, in_copies):
            copied = copy.deepcopy(counter)
            assert copied.add() == expected
            assert counter.count == 0
        assert copied.add() == 2 * expected


def test_the_class_of_a_scheduler_stays_the_same() -> None:
    scheduler = DDIMScheduler()
    with patched(scheduler, "set_timesteps", lambda own, owner, *args, **kwargs: own(*args, **kwargs)):
        assert type(scheduler) is DDIMScheduler
        scheduler.set_timesteps(3)
    assert len(scheduler.timesteps) == 3
