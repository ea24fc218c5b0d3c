"""The layout of a pipeline's guided step at each size, by a trial run at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stages.base.sampling import Condition, Request
from stages.base.size import Size, size_name
from stages.errors import UserError
from stages.generate.finding import recorded_constants
from stages.generate.layout import Layout
from stages.generate.probing import PROBED_SCALES, probe


def layouts_by_size(pipe: Any, layout: Layout, request: Request, examples: Sequence[Condition]) -> dict[str, Layout]:
    """The layout at the size of each example, by the size's name: the denoiser's constant arguments may differ.

    Args:
        layout: that of the first example; request: of its trial run.

    Raises:
        UserError: the pipeline does not make a size, or makes another one in its place.
    """
    layouts = {size_name(examples[0]): layout}
    densities: dict[int | None, float] = {}
    for example in examples if len(examples) > 1 else ():
        name = size_name(example)
        layouts[name], elements = layout_at(pipe, layout, replace(request, conditions=[example], seeds=[0]), name)
        if (size := Size.from_columns(example)) is not None:
            density = elements / (size.width * size.height)
            if densities.setdefault(size.num_frames, density) != density:
                raise UserError(
                    f"size {name}: {type(pipe).__name__} makes another size in its place, one that its VAE can divide: "
                    "give multiples of 8, 16 or 32, as its documentation says"
                )
    return layouts


def layout_at(pipe: Any, layout: Layout, request: Request, size: str) -> tuple[Layout, int]:
    """(the layout at the size of a request, the number of elements of a target there)."""
    step = probe(pipe, request, PROBED_SCALES[0])[-1]
    constants = recorded_constants(pipe, layout.conditional_call(step.calls), layout.arguments)
    found = replace(layout, arguments=replace(layout.arguments, constants=constants))
    try:
        return found, found.target(step.received, found.conditional(step.calls, 1)).numel()
    except RuntimeError as error:
        raise UserError(
            f"size {size}: {type(pipe).__name__} cannot be recorded at it as at the first size: leave it out"
        ) from error
