from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from stages.base.sampling import Condition
from stages.errors import UserError
from stages.evaluate.retrieval import Captions


def asking(*prompts: str) -> Sequence[Condition]:
    return [{"prompt": prompt} for prompt in prompts]


def directions(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_nearest_real_images_by_angle_are_compared_with_the_prompt() -> None:
    """Real images at 0, 10, ... 70 degrees; lengths do not matter."""
    captions = Captions(["a", "b", "c", "d", "e", "f", "g", "h"], ["x"] * 4 + ["y"] * 4)
    real = directions(*range(0, 80, 10)) * torch.arange(1, 9)[:, None]
    asked = captions.numbers_of(asking("a", "b", "c", "a"))
    assert asked is not None
    found = captions.adherence(9 * directions(1, 29, 39, 69), asked, real)
    # Nearest are a, d, e and h; among the nearest five of the second and third are b and c, of the last not a.
    assert found == {"retrieval_top1": 1 / 4, "retrieval_top5": 3 / 4, "category_accuracy": 2 / 4}


def test_any_image_of_a_prompt_counts() -> None:
    captions = Captions(["cat", "dog", "cat", "bird"], ["pet", "pet", "wild", "wild"])
    asked = captions.numbers_of(asking("cat", "dog", "bird", "dog"))
    assert asked is not None
    found = captions.adherence(directions(0, 91, 179, 181), asked, directions(0, 90, 180, 270))
    assert found == {"retrieval_top1": 2 / 4, "retrieval_top5": 1, "category_accuracy": 3 / 4}


def test_without_categories_there_is_no_category_accuracy() -> None:
    captions = Captions(["a", "b"], [])
    asked = captions.numbers_of(asking("b"))
    assert asked is not None
    assert captions.adherence(directions(1), asked, directions(0, 90)) == {"retrieval_top1": 0, "retrieval_top5": 1}


def test_prompts_of_no_real_image_are_left_out_and_a_mixture_is_refused() -> None:
    captions = Captions(["a", "b"], [])
    captions.check(asking("a", "b", "a"), "here")
    captions.check(asking("c", "d"), "here")
    captions.check([{"class_label": 1}], "here")
    assert captions.numbers_of(asking("c", "d")) is None
    with pytest.raises(UserError, match="prompts: 1 of 3 are in no row of here, e.g. 'c': name prompts of its rows"):
        captions.check(asking("a", "c", "b"), "here")
