"""Rules that guide some steps by CFG: at which steps, and which images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Place:
    """The place of a step in a sampling.

    Attributes:
        step, steps: its number, and the number of all that run; a scheduler of second order steps twice per timestep.
        timestep, timesteps: the number of its timestep, and that of all different timesteps.
    """

    step: int
    steps: int
    timestep: int
    timesteps: int


class Rule:
    """Says which of n images are guided at a step. A rule serves one sampling.

    Attributes:
        keeps_difference: whether a step without guidance applies the difference of the two predictions at the last
            guided step. Such a rule guides all images or none.
        compares: whether the rule wants to see the predictions.
    """

    keeps_difference = False
    compares = False

    def guided(self, place: Place, n: int) -> list[bool]:
        """Return for each of n images whether it is guided at a step; called once per step."""
        return [self.guides(place)] * n

    def guides(self, place: Place) -> bool:
        """Whether all images are guided at a step, or none."""
        raise NotImplementedError

    def see(self, latents: Tensor, conditional: Tensor, unconditional: Tensor, images: list[int]) -> None:
        """See the denoiser's input and the predictions `[k, ...]` of the guided images, whose numbers are given."""


class FirstSteps(Rule):
    """CFG on the first `ceil(percent / 100 * steps)` steps."""

    def __init__(self, percent: float) -> None:
        self.percent = int(percent)

    def guides(self, place: Place) -> bool:
        return place.step < -(-self.percent * place.steps // 100)


class Interval(Rule):
    """CFG in an interval of the timesteps (arXiv 2404.07724), in percent of their number.

    As with `start` and `stop` of diffusers' guiders, both ends are rounded down, and the last is not inside.
    """

    def __init__(self, start: float, stop: float) -> None:
        self.start, self.stop = int(start), int(stop)

    def guides(self, place: Place) -> bool:
        return self.contains(place.timestep, place.timesteps)

    def contains(self, timestep: int, timesteps: int) -> bool:
        """Whether the timestep of this number, of so many, is inside."""
        return self.start * timesteps // 100 <= timestep < self.stop * timesteps // 100


class Every(Rule):
    """CFG at every k-th timestep, from the first on; the difference is kept in between (idea: arXiv 2410.19355)."""

    keeps_difference = True

    def __init__(self, period: float) -> None:
        self.period = int(period)
        self.first: int | None = None

    def guides(self, place: Place) -> bool:
        if self.first is None:
            self.first = place.timestep
        return (place.timestep - self.first) % self.period == 0


class Agreement(Rule):
    """CFG for each image until its two predictions agree (arXiv 2312.12487), and none from the next step on.

    They agree when the cosine of the angle between them is above the threshold. At high noise, predictions of the noise
    agree whatever the condition. So the components along the denoiser's input are left out first; what remains differs
    by a factor only between models that predict the noise, the image or the velocity.
    """

    compares = True

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.ended: set[int] = set()

    def guided(self, place: Place, n: int) -> list[bool]:
        return [image not in self.ended for image in range(n)]

    def see(self, latents: Tensor, conditional: Tensor, unconditional: Tensor, images: list[int]) -> None:
        alike = agreement(latents, conditional, unconditional).tolist()
        self.ended |= {image for image, cosine in zip(images, alike, strict=True) if cosine > self.threshold}


def agreement(latents: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Cosines `[k]` of two predictions `[k, ...]` without their components along the latents `[k, ...]`."""
    along = functional.normalize(latents.flatten(1).float(), dim=1)

    def rest(prediction: Tensor) -> Tensor:
        flat = prediction.flatten(1).float()
        return flat - (flat * along).sum(1, keepdim=True) * along

    return functional.cosine_similarity(rest(one), rest(other), dim=1)
