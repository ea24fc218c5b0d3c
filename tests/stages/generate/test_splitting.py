from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stages.errors import UserError
from stages.generate.recorder import Recording
from stages.generate.splitting import Splitter
from stages.generate.unit import PlannedTrajectory

BATCH = [PlannedTrajectory(index, seed=index, guidance_scale=2.0, condition={"prompt": "x"}) for index in (4, 5)]


def recording(latent: torch.Tensor) -> Recording:
    """Two trajectories of three steps; the second denoiser takes the last step."""
    step, owner = torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3)
    timestep, effect = 900 - 300 * step, torch.arange(6).float()
    cond = {"tokens": torch.ones(2, 4, 3), "tokens_length": torch.tensor([4, 2])}
    negative = {"negative.tokens": torch.zeros(2, 4, 3)}
    return Recording(latent, timestep, -latent, effect, effect, owner, step, step // 2, cond, {}, negative)


def test_a_trajectory_is_split_by_denoiser_and_its_parts_are_numbered_consecutively() -> None:
    latent = torch.arange(6.0).view(6, 1, 1, 1)
    parts = list(Splitter(("unet", "unet_2"), torch.float16, 1, with_negative=False).split(BATCH, recording(latent)))
    assert [(part.index, part.denoiser, part.part, len(part)) for part in parts] == [
        (4, "unet", 0, 2), (4, "unet_2", 2, 1), (5, "unet", 0, 2), (5, "unet_2", 2, 1),
    ]  # fmt: skip
    assert parts[2].latent.flatten().tolist() == [1, 3]
    assert parts[0].latent.dtype == torch.float16
    assert parts[0].guidance_cosine is not None
    assert parts[0].guidance_cosine.dtype == torch.float32
    assert [part.cond["tokens"].shape[0] for part in parts] == [4, 4, 2, 2]
    assert parts[0].cond.keys() == {"tokens"}


def test_a_picture_is_named_without_the_folders_of_this_machine() -> None:
    condition = {"prompt": "/imagine a/cat", "image": "/home/me/cat.png", "mask_image": "masks/cat.png"}
    batch = [replace(planned, condition=condition) for planned in BATCH]
    splitter = Splitter(("unet", "unet_2"), torch.float16, 9, with_negative=False)
    part = next(splitter.split(batch, recording(torch.zeros(6, 1, 1, 1))))
    assert part.condition == condition | {"image": "cat.png"}


def test_negative_tokens_are_kept_on_request() -> None:
    splitter = Splitter(("unet", "unet_2"), torch.float16, 9, with_negative=True)
    assert next(splitter.split(BATCH, recording(torch.zeros(6, 1, 1, 1)))).cond.keys() == {"tokens", "negative.tokens"}


@pytest.mark.parametrize(
    ("value", "cause"), [(float("inf"), "is not finite"), (1e5, "does not fit into storage_dtype=float16")]
)
def test_a_number_that_cannot_be_stored_is_named(value: float, cause: str) -> None:
    latent = torch.zeros(6, 1, 1, 1)
    latent[3] = value
    with pytest.raises(UserError, match=f"^trajectory 5, step 1: the teacher's latent {cause}$"):
        list(Splitter(("unet", "unet_2"), torch.float16, 9, with_negative=False).split(BATCH, recording(latent)))
