"""The base model: a stock diffusers pipeline, or its denoiser alone, from a folder or a hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.guiders import BaseGuidance
from torch import nn

from stages.base.single_file import check_file_of_weights, denoiser_of_file, is_single_file, pipeline_of_file
from stages.errors import UserError
from stages.storage.hub import HUB

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def resolve(name_or_path: str) -> str:
    """A path as given, else the same path below the project (shipped files are found from anywhere), else a hub id."""
    check_name(name_or_path)
    for path in (Path(name_or_path), PROJECT_ROOT / name_or_path):
        if path.exists():
            return str(path)
    return name_or_path


def check_name(name_or_path: str) -> None:
    """
    Raises:
        UserError: it is the address of a dataset on the hub, which names a model by its id alone.
    """
    if name_or_path.startswith(HUB):
        raise UserError(f"{name_or_path}: leave out {HUB}: say {name_or_path.removeprefix(HUB)}")


def located(name_or_path: str) -> str:
    """As `resolve`, but paths are absolute, so that a process in another folder finds them too."""
    path = Path(resolve(name_or_path))
    return str(path.resolve()) if path.exists() else name_or_path


def has_several_gpus() -> bool:
    """Whether this machine has several GPUs, or RAY_ADDRESS names a cluster that may."""
    return bool(os.environ.get("RAY_ADDRESS")) or torch.cuda.device_count() > 1


def choose_device(name: str) -> str:
    """The torch device of an option's value; `auto` is a GPU where there is one.

    Raises:
        UserError: this machine lacks it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or (name.startswith("cuda") and torch.cuda.is_available()):
        return name
    raise UserError(f"device={name}: this device is not available: use device=auto")


def load_pipeline(
    name_or_path: str,
    torch_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    pipeline_class: str | None = None,
    config: str | None = None,
    **source: str | None,
) -> DiffusionPipeline:
    """Load the stock pipeline of a folder, a hub id or one file onto its device, without progress bars.

    Args:
        pipeline_class: its name in diffusers; by default the class that the model names.
        config: of one file, a folder or a hub id with the pipeline's configuration; see stages/base/single_file.py.
        source: `revision` and `variant` of the weights.
    """
    quieten()
    kind = diffusers_class(pipeline_class or "DiffusionPipeline", "teacher.pipeline_class")
    try:
        if is_single_file(name_or_path):
            pipe: Any = pipeline_of_file(resolve(name_or_path), _resolved(config), pipeline_class, torch_dtype)
            pipe.set_progress_bar_config(disable=True)
            return pipe.to(device)
        absent = {} if issubclass(kind, ModularPipeline) else dict.fromkeys(absent_components(name_or_path, **source))
        with quiet():  # of the types in its configuration, and of what a folder leaves out
            pipe = kind.from_pretrained(resolve(name_or_path), torch_dtype=torch_dtype, **absent, **source)
        if isinstance(pipe, ModularPipeline):
            pipe.load_components(torch_dtype=torch_dtype)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise UserError(f"{name_or_path}: no {kind.__name__} could be loaded from it: {first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def absent_components(name_or_path: str, **source: str | None) -> list[str]:
    """The components that a pipeline was saved without, such as T5 of Stable Diffusion 3.

    `from_pretrained` refuses some of them unless they are passed as None.
    """
    index = DiffusionPipeline.load_config(resolve(name_or_path), revision=source.get("revision"))
    return [name for name, entry in index.items() if entry == [None, None]]


def use_scheduler(pipe: Any, name: str, key: str) -> None:
    """Replace a pipeline's scheduler by one of another class, with the same configuration.

    Args:
        name: of the class in diffusers; key: of the option that names it.
    """
    kind = diffusers_class(name, key)
    if not hasattr(kind, "set_timesteps"):
        raise UserError(f"{key}={name}: no scheduler: name a class such as DDIMScheduler, or leave it out")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)


def new_guider(settings: dict[str, Any]) -> Any:
    """A guider of diffusers from its settings, `name` among them for its class."""
    kind = diffusers_class(str(settings.pop("name", None)), "teacher.guider.name")
    if not issubclass(kind, BaseGuidance):
        raise UserError(f"teacher.guider.name={kind.__name__}: no guider")
    try:
        return kind(**settings)
    except TypeError as error:
        raise UserError(f"teacher.guider: {kind.__name__} does not take that: {first_line(error)}") from error


def quieten() -> None:
    """Silence libraries while they load: this project's own errors report what goes wrong."""
    diffusers.utils.logging.disable_progress_bar()
    if diffusers.utils.is_transformers_available():
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context, diffusers logs errors alone."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)


def diffusers_class(name: str, key: str) -> Any:
    """A class of diffusers by its name; `key` is the option that names it."""
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type):
        raise UserError(f"{key}={name}: diffusers {diffusers.__version__} has no such class: name one that it has")
    return kind


def load_denoiser(
    name_or_path: str,
    subfolder: str,
    class_name: str,
    torch_dtype: torch.dtype,
    config: str | None = None,
    **source: str | None,
) -> nn.Module:
    """Load the denoiser alone, frozen, without text encoder, VAE and scheduler.

    Args:
        config: of one file, a folder or a hub id with the pipeline's configuration.
    """
    kind = diffusers_class(class_name, "denoiser_class")
    with _named(name_or_path, class_name):
        if is_single_file(name_or_path):
            denoiser = denoiser_of_file(resolve(name_or_path), _resolved(config), subfolder, kind, torch_dtype)
        else:
            path = resolve(name_or_path)
            denoiser = kind.from_pretrained(path, subfolder=subfolder, torch_dtype=torch_dtype, **source)
    return denoiser.eval().requires_grad_(False)


def denoiser_config(
    name_or_path: str, subfolder: str, class_name: str, config: str | None = None, **source: str | None
) -> dict[str, Any]:
    """The configuration of a denoiser, read without its weights; `_class_name` names its actual class.

    Args:
        config: of one file, a folder or a hub id with the pipeline's configuration.
    """
    kind = diffusers_class(class_name, "denoiser_class")
    with _named(name_or_path, class_name):
        if is_single_file(name_or_path):
            check_file_of_weights(resolve(name_or_path), _resolved(config))
            name_or_path = _resolved(config)
        return kind.load_config(resolve(name_or_path), subfolder=subfolder, **source)


def _resolved(config: str | None) -> str:
    return resolve(config) if config else ""


@contextmanager
def _named(name_or_path: str, class_name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise UserError(
            f"{name_or_path}: no {class_name} could be loaded from it ({first_line(error)}): "
            "name where it is with pretrained_model_name_or_path=..."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message; libraries add pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
