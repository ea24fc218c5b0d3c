from __future__ import annotations

import warnings
from typing import Any

import pytest

from stages.adapters.metadata import AdapterMetadata
from stages.evaluate.sizes import warn_of_another_size
from tests.support.families import stable_diffusion_3

OWN, OTHER = {"width": 32, "height": 32}, {"width": 48, "height": 32}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = stable_diffusion_3()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("trained", "asked", "message"),
    [
        (["32x32"], OTHER, "trained at 32x32; 48x32 is another size"),
        (["32x32", "32x48"], OTHER, "trained at 32x32, 32x48; 48x32 is another size"),
        (["default"], OTHER, "trained at 32x32; 48x32 is another size"),
        (["48x32"], {}, "trained at 48x32; 32x32 is another size"),
        (["32x32", "48x32"], OTHER, None),
        (["default"], OWN, None),
        (["32x32"], {}, None),
        (["default"], {}, None),
        ([], OTHER, None),
    ],
)
def test_another_size_than_those_of_the_training_is_told(
    trained: list[str], asked: dict[str, int], message: str | None, pipe: Any
) -> None:
    sizes = {name: [4, 8, 8] for name in trained}
    metadata = AdapterMetadata(conditions={}, scale_range=[1.0, 2.0], training={"sizes": sizes})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        warn_of_another_size(pipe, metadata, {"prompt": "a cat", **asked}, OWN)
    assert [str(warning.message) for warning in told] == ([] if message is None else [f"the adapter was {message}"])
