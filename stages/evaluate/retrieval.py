"""Prompt adherence by retrieval: whether a sample's nearest real images are those of its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stages.base.sampling import Condition
from stages.errors import UserError

NEAREST = 5
BLOCK = 1000


class Captions:
    """What each real image shows.

    Args:
        prompts: one per image; several images may have the same.
        categories: one per image, or none at all.
    """

    def __init__(self, prompts: Sequence[str], categories: Sequence[str]) -> None:
        self.prompts = list(dict.fromkeys(prompts))
        self.numbers = {prompt: number for number, prompt in enumerate(self.prompts)}
        self.prompt_of = torch.tensor([self.numbers[prompt] for prompt in prompts])
        names = {name: number for number, name in enumerate(dict.fromkeys(categories))}
        self.category_of = torch.tensor([names[name] for name in categories]) if names else None

    def check(self, conditions: Sequence[Condition], named: str) -> None:
        """Check that the prompts of all conditions are prompts of real images, or of none.

        Raises:
            UserError: of some only, whose mean would say nothing of the others; `named` is the real images' source.
        """
        unknown = [text for c in conditions if (text := c.get("prompt", "")) not in self.numbers]
        if unknown and len(unknown) < len(conditions):
            raise UserError(
                f"prompts: {len(unknown)} of {len(conditions)} are in no row of {named}, e.g. {unknown[0]!r:.80}: name "
                "prompts of its rows alone, or of none"
            )

    def numbers_of(self, conditions: Sequence[Condition]) -> Tensor | None:
        """The numbers `[n]` of the conditions' prompts; None if they are not prompts of real images."""
        numbers = [self.numbers.get(condition.get("prompt", "")) for condition in conditions]
        return None if None in numbers else torch.tensor(numbers)

    def adherence(self, features: Tensor, asked: Tensor, real: Tensor) -> dict[str, float]:
        """The shares of samples whose nearest real images, by the cosine of features, fit the prompt.

        Args:
            features: of the samples `[n, f]`.
            asked: the numbers `[n]` of their prompts.
            real: features of the real images `[m, f]`, in their order.

        Returns:
            `retrieval_top1` and `retrieval_top5`: the nearest image, or one of the five nearest, is of the prompt;
            `category_accuracy`: the nearest is of the category of the prompt's images.
        """
        real = functional.normalize(real, dim=1)
        blocks = [functional.normalize(block, dim=1) @ real.T for block in features.split(BLOCK)]
        nearest = torch.cat([block.topk(min(NEAREST, len(real))).indices.cpu() for block in blocks])
        fits = self.prompt_of[nearest] == asked[:, None]
        found = {"retrieval_top1": fits[:, 0], "retrieval_top5": fits.any(dim=1)}
        if self.category_of is not None:
            has = torch.zeros(len(self.prompts), int(self.category_of.max()) + 1, dtype=torch.bool)
            has[self.prompt_of, self.category_of] = True
            found["category_accuracy"] = has[asked, self.category_of[nearest[:, 0]]]
        return {name: float(share.double().mean()) for name, share in found.items()}
