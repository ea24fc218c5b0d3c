"""The size of the images that an evaluation samples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from stages.adapters.metadata import AdapterMetadata
from stages.base.loading import first_line
from stages.base.sampling import Condition, Request, decode, sample, shape_of_images, undecoded
from stages.base.size import DEFAULT_SIZE, SIZE_KEYS, VIDEO_DIMS, Size, size_name
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
        made = size.made(shape_made(pipe, condition, arguments))
    except Exception as error:  # a pipeline's own code may raise anything
        raise UserError(f"{named}: {type(pipe).__name__} does not make it: {first_line(error)}") from error
    if made != size:
        raise UserError(
            f"{named}: {type(pipe).__name__} makes {made.name} in its place: say size={list(made.columns.values())}"
        )


def shape_made(pipe: Any, condition: Condition, arguments: dict[str, Any]) -> Sequence[int]:
    """The shape of an image or a video `[1, ...]` that a pipeline makes of a condition, found by two steps."""
    with undecoded(pipe) as latents:
        sample(pipe, Request([condition], [0], 2, arguments), 1.0)
    return shape_of_images(latents) or decode(pipe, latents[0]).shape


def warn_of_another_size(pipe: Any, metadata: AdapterMetadata, condition: Condition, arguments: dict[str, Any]) -> None:
    """Warn where the adapter was trained at other sizes than the condition's; older adapters do not tell theirs."""
    trained = metadata.training.get("sizes", {})
    if not trained or (asked := size_name(condition)) in trained:
        return
    own = DEFAULT_SIZE
    if own in (asked, *trained):
        plain = {key: value for key, value in condition.items() if key not in SIZE_KEYS}
        *_, height, width = shape = shape_made(pipe, plain, arguments)
        own = Size(width, height, shape[2] if len(shape) == VIDEO_DIMS else None).name
    asked, *names = (own if name == DEFAULT_SIZE else name for name in (asked, *trained))
    if asked not in names:
        warnings.warn(f"the adapter was trained at {', '.join(names)}; {asked} is another size", stacklevel=2)
