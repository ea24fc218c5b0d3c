"""Check the extra arguments of a teacher's call, `teacher.call`."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from stages.base.pictures import PICTURES
from stages.base.sampling import SCALE_KEYWORDS
from stages.errors import UsageError
from stages.generate.config import TeacherConfig

NOTHING = "nothing on a command line can be one"
# Arguments of pipelines that an option or this project decides, and what to do instead.
DECIDED = {
    "prompt": "say prompts=FILE",
    "class_labels": "say class_labels=...",
    **{name: f"give prompts=FILE a column {name}" for name in PICTURES},
    "num_inference_steps": "say num_inference_steps=...",
    "timesteps": "say num_inference_steps=...",
    "sigmas": "say num_inference_steps=...",
    "generator": "say seed=..., or give prompts=FILE a column seed",
    "latents": "say seed=..., or give prompts=FILE a column seed",
    **{
        f"num_{what}_per_prompt": "say num_trajectories_per_condition=..." for what in ("images", "videos", "waveforms")
    },
    "output_type": "nothing but records is put out; preview=... shows images",
    "return_dict": "nothing but records is put out",
    "callback": NOTHING,
    "callback_steps": NOTHING,
    "callback_on_step_end": NOTHING,
    "callback_on_step_end_tensor_inputs": NOTHING,
}
TENSORS = ("_embeds", "_attention_mask")  # in the names of arguments that only a program can pass


def check_arguments(pipeline_class: type | None, arguments: Mapping[str, Any], teacher: TeacherConfig) -> None:
    """Refuse arguments that an option decides, and those that the pipeline's `__call__` does not take.

    Args:
        pipeline_class: None where it is unknown, or modular: then unknown arguments pass.
        arguments: `teacher.call`.

    Raises:
        UsageError: names the argument, and what to do instead.
    """
    known = None if pipeline_class is None else inspect.signature(pipeline_class.__call__).parameters
    keyword = "guidance_scale" if known is None else next((name for name in SCALE_KEYWORDS if name in known), None)
    decided = {keyword: "say guidance_scale=[LOWEST,HIGHEST]"} | DECIDED
    for name, value in arguments.items():
        option = f"teacher.call.{name}"
        if name in decided:
            raise UsageError(f"{option}: decided elsewhere: leave it out: {decided[name]}")
        if name in ("height", "width") and getattr(teacher, name) is not None:
            raise UsageError(f"{option}: decided by teacher.{name}={getattr(teacher, name)}: leave one of them out")
        if known is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]}?" if near else ": leave it out"
            assert pipeline_class is not None
            raise UsageError(f"{option}: {pipeline_class.__name__} takes no such argument{hint}")
        if any(part in name for part in TENSORS):
            raise UsageError(f"{option}: {NOTHING}: leave it out: say prompts=FILE")
        if is_number_or_bool(value) and (name == "negative_prompt" or (known is not None and takes_text(known[name]))):
            raise UsageError(f"""{option}={value}: not a text: put it into quotes: {option}='"{value}"'""")
    for name in ("height", "width"):
        size = getattr(teacher, name)
        if size is not None and pipeline_class is not None and known is not None and name not in known:
            raise UsageError(f"teacher.{name}={size}: {pipeline_class.__name__} takes no {name}: leave it out")


def is_number_or_bool(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def takes_text(parameter: inspect.Parameter) -> bool:
    """Whether an argument is annotated as text and not also as a number."""
    types = set(re.findall(r"\w+", str(parameter.annotation)))
    return "str" in types and not types & {"int", "float", "bool"}
