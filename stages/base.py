"""The base model: what every part needs to know of a stock diffusers pipeline and of its denoiser."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from stages.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
DENOISER_NAMES = ("unet", "transformer")


def resolve_model(name_or_path: str) -> str:
    """A folder as given, or the same below the project (so that embedded teachers are found from any directory), or a hub id."""
    for folder in (Path(name_or_path), PROJECT_ROOT / name_or_path):
        if folder.is_dir():
            return str(folder)
    return name_or_path


def choose_device(name: str) -> str:
    """`auto` is a GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or (name.startswith("cuda") and torch.cuda.is_available()):
        return name
    raise UserError(f"device={name}: not here: `auto` takes what there is")


def load_pipeline(
    name_or_path: str, torch_dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> DiffusionPipeline:
    """The stock pipeline of a folder or a hub id, quiet and on its device."""
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(resolve_model(name_or_path), torch_dtype=torch_dtype)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name_or_path}: no diffusers pipeline could be loaded from it: {first_line(error)}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_denoiser(name_or_path: str, subfolder: str, class_name: str, torch_dtype: torch.dtype) -> nn.Module:
    """The denoiser alone, frozen: no text encoder, no VAE, no scheduler is loaded."""
    kind = getattr(diffusers, class_name, None)
    if kind is None:
        raise UserError(
            f"diffusers {diffusers.__version__} has no {class_name}: install the version that made the dataset"
        )
    try:
        denoiser = kind.from_pretrained(resolve_model(name_or_path), subfolder=subfolder, torch_dtype=torch_dtype)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name_or_path}: no {class_name} could be loaded from it ({first_line(error)}): "
            "name where it is with pretrained_model_name_or_path=..."
        ) from error
    return denoiser.eval().requires_grad_(False)


def first_line(error: BaseException) -> str:
    """What went wrong, without the pages that libraries add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """(`"unet"` or `"transformer"`, the module): the part of a pipeline that is called once per step."""
    for name in DENOISER_NAMES:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise UserError(f"{type(pipe).__name__} has neither a `unet` nor a `transformer`: it cannot be a teacher")


def bind_inputs(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one denoiser call by the denoiser's own names; the first of them is the latent."""
    return dict(inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments)


def latent_name(denoiser: nn.Module) -> str:
    """What the denoiser calls its latent: `sample` in a UNet, `hidden_states` in a transformer."""
    return next(iter(inspect.signature(denoiser.forward).parameters))


def fingerprint(module: nn.Module) -> str:
    """A hash of every weight with its name, shape and dtype: equal weights, equal fingerprint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def undecoded(pipe: Any) -> Iterator[list[Tensor]]:
    """Within it the pipeline decodes nothing: the latents `[n, c, h, w]` it would have decoded are kept in the list."""
    latents: list[Tensor] = []
    vae = pipe.vae

    def keep(z: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        latents.append(z)
        return DecoderOutput(sample=z) if return_dict else (z,)

    vae.decode = keep
    try:
        yield latents
    finally:
        del vae.decode


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Images `[n, channels, height, width]` in [-1, 1] from latents that `undecoded` kept."""
    return pipe.vae.decode(latents).sample.clamp(-1, 1)
