"""The layout of a pipeline's guided step at each size, by a trial run at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stages.base.sampling import Condition, Request, shape_of_images
from stages.base.size import Size, size_name
from stages.errors import UserError
from stages.generate.finding import recorded_constants
from stages.generate.layout import Layout
from stages.generate.probing import PROBED_SCALES, probe_to_images


def layouts_by_size(pipe: Any, layout: Layout, request: Request, examples: Sequence[Condition]) -> dict[str, Layout]:
    """The layout at the size of each example, by the size's name: the denoiser's constant arguments may differ.

    Args:
        layout: that of the first example; request: of its trial run.

    Raises:
        UserError: the pipeline does not make a size, or makes another one in its place.
    """
    layouts = {size_name(examples[0]): layout}
    for example in examples:
        if (size := Size.from_columns(example)) is not None or example is not examples[0]:
            at_size = replace(request, conditions=[example], seeds=[0])
            layouts[size_name(example)] = layout_at(pipe, layout, at_size, size)
    return layouts


def layout_at(pipe: Any, layout: Layout, request: Request, size: Size | None) -> Layout:
    """The layout at the size of a request; None is the pipeline's own."""
    steps, kept = probe_to_images(pipe, request, PROBED_SCALES[0])
    named = f"size {size_name(request.conditions[0])}: {type(pipe).__name__}"
    if size is not None and (shape := shape_of_images(kept)) and (made := size.made(shape)) != size:
        raise UserError(f"{named} makes {made.name} in its place: name that, or another that it makes")
    calls = steps[-1].calls
    constants = recorded_constants(pipe, layout.conditional_call(calls), layout.arguments)
    found = replace(layout, arguments=replace(layout.arguments, constants=constants))
    try:
        found.target(steps[-1].received, found.conditional(calls, 1))
    except RuntimeError as error:
        raise UserError(f"{named} cannot be recorded at it as at the first size: leave it out") from error
    return found
