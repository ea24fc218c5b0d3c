"""The size of the images that an evaluation samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.base.loading import first_line
from stages.base.sampling import Condition, Request, decode, sample, shape_of_images, undecoded
from stages.base.size import SIZE_KEYS, Size, size_name
from stages.errors import UsageError, UserError


def at_size(conditions: Sequence[Condition], size: list[int] | None) -> list[Condition]:
    """The conditions at the size of the option `size`; without it, at their own, which must be one.

    Raises:
        UserError: `size` is no size, or the conditions name several.
    """
    if size is None:
        if len(sizes := {size_name(condition) for condition in conditions}) > 1:
            raise UserError(
                f"prompts: of several sizes ({', '.join(sorted(sizes))}): say size=[WIDTH,HEIGHT], and evaluate each in a "
                "run of its own"
            )
        return list(conditions)
    try:
        columns = Size.from_list(size).columns
    except ValueError as error:
        raise UsageError(f"size={size}: {error}") from error
    return [{k: v for k, v in condition.items() if k not in SIZE_KEYS} | columns for condition in conditions]


def check_size(pipe: Any, condition: Condition, arguments: dict[str, Any]) -> None:
    """Sample an image in two steps, to find out before any work is done that the pipeline makes its size.

    Raises:
        UserError: it does not, or makes another one in its place.
    """
    size = Size.from_columns(condition)
    if size is None:
        return
    named = f"size={list(size.columns.values())}"
    try:
        with undecoded(pipe) as latents:
            sample(pipe, Request([condition], [0], 2, arguments), 1.0)
        made = size.made(shape_of_images(latents) or decode(pipe, latents[0]).shape)
    except Exception as error:  # a pipeline's own code may raise anything
        raise UserError(f"{named}: {type(pipe).__name__} does not make it: {first_line(error)}") from error
    if made != size:
        raise UserError(
            f"{named}: {type(pipe).__name__} makes {made.name} in its place: say size={list(made.columns.values())}"
        )
