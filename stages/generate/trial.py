"""A trial of training before anything is recorded: assemble a student's call from a record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.base.arguments import Caller
from stages.base.denoiser import as_target, denoisers_of, predictions_of
from stages.base.loading import first_line
from stages.errors import UserError
from stages.generate.layout import Layout, Pass

COPIES = 3  # copies of the trial samples in the student's batch
ALIKE = 0.02  # relative distance below which predictions are equal up to rounding


@torch.no_grad()
def check_trial(pipe: Any, layout: Layout, seen: Pass) -> None:
    """Run the denoiser on a batch of copies of a pass's record, and look for an adapter's sites.

    Raises:
        UserError: the prediction differs from the pass's, or no adapter fits the denoiser.
    """
    denoiser: Any = denoisers_of(pipe)[seen.denoiser]
    cond = {name: _copied(value) for name, value in (seen.cond | seen.steps).items()}
    caller = Caller(layout.arguments, seen.latent.device)
    batch = _copied(seen.latent), _copied(seen.timestep), cond
    try:
        output = denoiser(**caller.nested(*batch), return_dict=False)
    except Exception as error:  # a denoiser's own code may raise anything
        raise _refused(
            pipe, f"its denoiser does not run on records: {type(error).__name__}: {first_line(error)}"
        ) from error
    predicted, expected = as_target(predictions_of(output), layout.target_channels), _copied(seen.prediction)
    if predicted.shape != expected.shape or float((predicted - expected).norm()) > ALIKE * float(expected.norm()):
        raise _refused(pipe, "its denoiser does not predict the same from records: it sees more than its arguments")
    metadata = {
        "conditions": {},
        "arguments": {},
        "scale_range": [1.0, 2.0],
        "timestep": layout.arguments.timestep,
        "timestep_scale": layout.timestep_scale,
        "timestep_offset": layout.timestep_offset,
        "axes": layout.arguments.facts()["axes"],
    }
    GuidanceAdapter.for_denoiser(AdapterConfig(), denoiser, metadata, caller.flat(*batch))


def _copied(value: Tensor) -> Tensor:
    return torch.cat([value] * COPIES)


def _refused(pipe: Any, found: str) -> UserError:
    return UserError(
        f"{type(pipe).__name__} cannot be recorded: {found}: take another class (teacher.pipeline_class=...)"
    )
