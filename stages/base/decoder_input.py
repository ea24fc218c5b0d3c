"""The step between a pipeline's last latents and its decoder, by diffusers' convention.

Pipelines that pack latents as tokens unpack them (`_unpack_latents` of Flux and others, in patches of p x p), and all
undo the normalisation that the VAE's configuration gives. Whether a pipeline does that and no more is found by
comparing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

SAME = 0.02  # relative distance; a decoder in half precision receives rounded latents


def to_decoder_input(config: Mapping[str, Any], latents: Tensor, shape: Sequence[int]) -> Tensor:
    """What a VAE decodes, `[n, c, height, width]` or `[n, c, frames, height, width]`.

    Args:
        config: of the VAE.
        latents: `[n, ...]` after the scheduler's last step.
        shape: without n.

    Raises:
        ValueError: such latents do not have this shape.
    """
    if latents.ndim == 3:
        latents = unpack(latents, shape)
    found = list(latents.shape[1:])
    if [size for size in found if size > 1] != [size for size in shape if size > 1]:
        raise ValueError(f"latents {found} instead of {list(shape)}")
    latents = latents.reshape(-1, *shape)  # a single frame may have an axis or none
    factor = config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents / factor + (config.get("shift_factor") or 0.0)
    each = (-1, *[1] * (len(shape) - 1))
    return latents * latents.new_tensor(std).view(each) / factor + latents.new_tensor(mean).view(each)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Latents `[n, *shape]` from tokens `[n, frames * height / p * width / p, c * p * p]`.

    Raises:
        ValueError: they do not fit the shape.
    """
    channels, *frames, height, width = shape
    p = math.isqrt(tokens.shape[2] // channels)
    grid = (*frames, height // p, width // p)
    if p == 0 or tokens.shape[1:] != (math.prod(grid), channels * p * p) or height % p or width % p:
        raise ValueError(f"tokens {list(tokens.shape[1:])} instead of latents {list(shape)}")
    patches = tokens.view(len(tokens), math.prod(frames), height // p, width // p, channels, p, p)
    return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(len(tokens), *shape)


def follows_convention(config: Mapping[str, Any], latents: Tensor, decoded: Tensor) -> bool:
    """Whether the decoder's input `decoded` follows from the latents by `to_decoder_input` alone."""
    try:
        expected = to_decoder_input(config, latents.double().cpu(), decoded.shape[1:])
    except (ValueError, RuntimeError):  # of other shapes
        return False
    return bool((decoded.double().cpu() - expected).norm() <= SAME * expected.norm())
