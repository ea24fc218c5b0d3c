"""Every specimen is built, saved, loaded and guided, and its condition matters.

Otherwise its other tests would show nothing.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image, ImageSequence
from torch import Tensor

from stages.base.sampling import SCALE_KEYWORDS, Condition
from tests.pipelines_zoo.gathered import gather
from tests.pipelines_zoo.specimen import Specimen

pytestmark = pytest.mark.zoo
ZOO = gather()
SCALES_OF_STAGES = ("prior_guidance_scale", "decoder_guidance_scale", "max_guidance_scale")
CLEARLY = 0.01
OUTPUTS = {"StableDiffusionLDM3DPipeline": "np"}  # tensors, if the pipeline can return them


def frames(path: str) -> list[Image.Image]:
    return [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(path))]


OPENED: dict[str, Callable[[str], Any]] = {"image": Image.open, "mask_image": Image.open, "video": frames}


def info(condition: Condition) -> dict[str, Any]:
    """Return a condition as call arguments: a list of one where the pipeline requires it, with pictures opened."""
    info = {key: OPENED[key](value) if key in OPENED else value for key, value in condition.items()}
    return {"class_labels": [info.pop("class_label")], **info} if "class_label" in info else info


def guided_by(pipe: Any, scale: float) -> dict[str, Any]:
    """Return the call arguments that set a scale: one, several, or none if the pipeline's guider is set."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    keyword = next((name for name in SCALE_KEYWORDS if name in parameters), None)
    scales = [keyword] if keyword else [name for name in SCALES_OF_STAGES if name in parameters]
    arguments = dict.fromkeys(scales, scale)
    if scale == 1 and "pag_scale" in parameters:
        arguments["pag_scale"] = 0.0  # some require their own kind of guidance to be off as well
    if not scales:
        pipe.guider.guidance_scale = scale
    return arguments


def predictions(pipe: Any, specimen: Specimen, scale: float, place: int) -> list[Tensor]:
    """Return the inputs of the pipeline's schedulers in two steps, for the sample at a position."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = dict(specimen.arguments) | info(specimen.conditions[place])
    arguments["generator"] = torch.Generator().manual_seed(0)
    steps = [name for name in parameters if name.endswith("num_inference_steps")]
    arguments |= dict.fromkeys([name for name in steps if name not in specimen.arguments], 2)
    if "output_type" in parameters:
        arguments["output_type"] = OUTPUTS.get(type(pipe).__name__, "pt")
    torch.manual_seed(0)  # some encode their picture with noise from the global generator
    with watched(pipe) as seen, torch.no_grad():
        pipe(**arguments, **guided_by(pipe, scale))
    return seen


@contextmanager
def watched(pipe: Any) -> Iterator[list[Tensor]]:
    """Collect the inputs of `step` of the pipeline's schedulers and their copies within the context."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for kind in {type(part) for part in vars(pipe).values() if isinstance(part, SchedulerMixin)}:
            stack.enter_context(mock.patch.object(kind, "step", seeing(kind.step, seen)))
        yield seen


def seeing(step: Callable[..., Any], seen: list[Tensor]) -> Callable[..., Any]:
    @functools.wraps(step)  # pipelines inspect its signature
    def see(scheduler: Any, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(model_output.detach().clone())
        return step(scheduler, model_output, *args, **kwargs)

    return see


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the relative distance of the last predictions; infinite if one is not a number."""
    relative = float((one[-1] - other[-1]).norm() / other[-1].norm().clamp(min=1e-12))
    return relative if relative == relative else float("inf")


@pytest.mark.parametrize("name", ZOO)
def test_a_specimen_is_saved_loaded_and_guided(name: str, tmp_path: Path) -> None:
    specimen = ZOO[name]
    assert json.loads(json.dumps(dict(specimen.arguments))) == specimen.arguments
    pipe = specimen.build()
    assert type(pipe).__name__ == name.split(" ")[0]
    try:
        guided = predictions(pipe, specimen, 3.0, 0)
    except NameError as missing:  # pipelines import optional packages if installed, and use them unconditionally
        pytest.skip(f"needs a package that is not installed: {missing}")
    assert CLEARLY < distance(predictions(pipe, specimen, 1.0, 0), guided) < float("inf")
    assert CLEARLY < distance(predictions(pipe, specimen, 3.0, 1), guided) < float("inf")
    pipe.save_pretrained(tmp_path)
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    if getattr(getattr(pipe, "vae", None), "use_tiling", False):
        loaded.vae.enable_tiling()  # it is not saved
    assert distance(predictions(loaded, specimen, 3.0, 0), guided) < 1e-4
