from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.errors import UsageError
from stages.train.compatibility import check_together
from stages.train.config import TrainConfig
from stages.train.defaults import LEAST_STEPS, MOST_STEPS, PASSES, RunConfig, complete, describe_course
from tests.conftest import VARIANTS, small_adapter


def completed(records: int = 64_000, processes: int = 1, **changes: Any) -> RunConfig:
    return complete(TrainConfig("data", "run", **changes), records, processes)


def test_the_length_is_a_number_of_passes_within_bounds() -> None:
    assert completed().max_train_steps == PASSES * 1000
    assert completed(processes=2).max_train_steps == PASSES * 500
    assert completed(gradient_accumulation_steps=2, train_batch_size=16).max_train_steps == PASSES * 2000
    assert completed(100).max_train_steps == LEAST_STEPS
    assert completed(10**9).max_train_steps == MOST_STEPS


def test_what_the_user_gives_stays() -> None:
    config = completed(max_train_steps=50, learning_rate=1e-4, lr_warmup_steps=7)
    assert (config.max_train_steps, config.learning_rate, config.lr_warmup_steps) == (50, 1e-4, 7)
    assert (completed(max_train_steps=50).lr_warmup_steps, completed(max_train_steps=50).validation_steps) == (5, 13)
    assert completed(10**9).validation_steps == 1000
    assert describe_course(config, 6400, 1) == [
        "50 steps of 64 records, 0.5 passes over 6,400; learning rate 0.0001 after 7 steps of warm-up; "
        f"validation every {config.validation_steps} steps"
    ]
    constant = completed(max_train_steps=50, lr_scheduler="constant", learning_rate=1e-4)
    assert describe_course(constant, 6400, 1)[0].endswith("learning rate 0.0001; validation every 13 steps")


def test_few_records_are_told() -> None:
    course = describe_course(completed(100), 100, 1)
    assert course[1:] == ["100 records are few for so many passes: generate more, or lower max_train_steps"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_has_a_rate(variant: str) -> None:
    rates = {"lora": 5e-3, "full": 3e-4}
    assert completed(adapter=small_adapter(variant)).learning_rate == rates.get(variant, 2e-3)


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    message = "lr_warmup_steps=200: the run has 100 steps: lower it, or leave it out"
    with pytest.raises(UsageError, match=message):
        check_together(TrainConfig(str(tmp_path), "run", max_train_steps=100, lr_warmup_steps=200))
    with pytest.raises(UsageError, match="lr_warmup_steps=1000: the run has 1000 steps"):
        completed(100, lr_warmup_steps=1000)
