"""Sampling without images: the final latents are kept, and nothing that makes images or looks at them costs anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import SchedulerMixin
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from stages.base.patching import patched
from stages.errors import UserError

RECORDED_ONLY = "it can be recorded, with preview=0, and trained on, but not shown"
LOOKING = ("safety_checker", "watermark")  # in the names of what looks at images
LOOKS_AT = ("image", "video", "frame")  # in the names of a checker's methods that do; others look at prompts


class Kept(list[Tensor]):
    """The final latents `[n, ...]` of each run of a pipeline.

    What a decoder was handed, where that has an entry per sample; else what the scheduler's last step made.

    Attributes:
        ended: the clock (`time.perf_counter`) after the last run's last step; None while it goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ended: float | None = None
        self.steps = self.rows = 0
        self._handed: list[Tensor] = []
        self._stepped: set[int] = set()  # the schedulers of this run

    def begin(self, scheduler: Any) -> None:
        """A scheduler's grid is set: a second time in a run, another run begins."""
        if id(scheduler) in self._stepped:
            self._stepped.clear()
        self.steps = 0

    def step(self, scheduler: Any, latents: Tensor) -> None:
        if not self._stepped:
            self.append(latents)
        self._stepped.add(id(scheduler))
        self[-1], self.rows, self._handed = latents, len(latents), []
        self.steps += 1
        self.ended = None

    def end(self, pipe: Any) -> None:
        """The last step is made, or whoever comes after it begins."""
        if self.ended is None:
            synchronize(pipe)
            self.ended = time.perf_counter()

    def hand(self, latents: Tensor) -> None:
        """A decoder is handed latents, perhaps of some samples only, or of some frames."""
        self._handed.append(latents)
        if not self._stepped:
            self.append(latents)
        elif sum(map(len, self._handed)) <= self.rows:
            self[-1] = torch.cat(self._handed) if len(self._handed) > 1 else latents


_WATCHED: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()
_SHAPES: WeakKeyDictionary[nn.Module, dict[Any, torch.Size]] = WeakKeyDictionary()
_OPTIONS: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


@contextmanager
def undecoded(pipe: Any) -> Iterator[Kept]:
    """Within it the pipeline decodes nothing: its decoders answer with blanks of the right shape, and nobody looks at those.

    The final latents of each run are kept in the list.
    """
    kept, before = Kept(), _WATCHED.get(pipe)
    decoders = decoders_of(pipe)
    with ExitStack() as stack:
        for part in {id(part): part for part in pipe.components.values() if isinstance(part, SchedulerMixin)}.values():
            _watch(pipe, part, kept, stack)
        for i, decoder in enumerate(decoders):
            stack.enter_context(patched(decoder, "decode", _answering(pipe, kept, is_main=i == 0)))
        stack.enter_context(_unlooked(pipe))
        _WATCHED[pipe] = kept
        try:
            yield kept
        finally:
            del _WATCHED[pipe]
            if before is not None:
                _WATCHED[pipe] = before


@contextmanager
def up_to_images(pipe: Any, n: int) -> Iterator[None]:
    """Within it, while `undecoded` watches, a call of the pipeline that fails after its last step has done all that is asked.

    Args:
        n: samples; latents of frames, which some pipelines put into the batch, are kept as `[n, frames, ...]`.
    """
    kept = _WATCHED.get(pipe)
    try:
        yield
    except UserError:
        raise
    except Exception:
        if kept is None or kept.ended is None:
            raise
        getattr(pipe, "maybe_free_model_hooks", lambda: None)()  # with which pipelines end
    if kept and len(kept[-1]) > n and len(kept[-1]) % n == 0:
        kept[-1] = kept[-1].unflatten(0, (n, -1))


def synchronize(pipe: Any) -> None:
    """Wait for the GPU, so that a clock read afterwards has seen all of its work."""
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()


def decoders_of(pipe: Any) -> list[nn.Module]:
    """Whatever decodes latents in a pipeline (`vae`, `movq`, `vqgan`, ...), that of its images first."""
    found = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    decoders = {name: part for name, part in found.items() if callable(getattr(part, "decode", None))}
    return [decoders[name] for name in sorted(decoders, key=lambda name: name != "vae")]


def _watch(pipe: Any, scheduler: Any, kept: Kept, stack: ExitStack) -> None:
    """Tell of a scheduler's steps; a copy that a pipeline makes of it is another's."""

    def set_timesteps(own: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        kept.begin(owner)

    def step(own: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        kept.step(owner, result[0])
        if kept.steps == len(owner.timesteps):
            kept.end(pipe)
        return result

    stack.enter_context(patched(scheduler, "set_timesteps", set_timesteps))
    stack.enter_context(patched(scheduler, "step", step))


def _answering(pipe: Any, kept: Kept, is_main: bool) -> Callable[..., Any]:
    """A `decode` that keeps what it is handed, and answers with a blank."""

    def decode(own: Any, decoder: Any, z: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        kept.end(pipe)
        if is_main:
            kept.hand(z)
        _OPTIONS[decoder] = {name: value for name, value in kwargs.items() if isinstance(value, (bool, int, float))}
        shapes = _SHAPES.setdefault(decoder, {})
        key = (z.shape, tuple(sorted(_OPTIONS[decoder].items())))
        if key not in shapes:
            shapes[key] = _shape_of_decoded(decoder, z, args, kwargs)
        blank = torch.zeros((), dtype=z.dtype, device=z.device).expand(shapes[key])
        return DecoderOutput(sample=blank) if return_dict else (blank,)

    return decode


def _shape_of_decoded(decoder: Any, z: Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Size:
    """As a decoder of the same configuration tells it on the meta device; the latents' own where that does not run."""
    named = {name: _on_meta(value) for name, value in kwargs.items() if name != "generator"}
    try:
        with torch.device("meta"), torch.no_grad():
            twin = type(decoder).from_config(decoder.config).to(z.dtype)
            return twin.decode(_on_meta(z), *map(_on_meta, args), **named)[0].shape
    except Exception:
        return z.shape


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@contextmanager
def _unlooked(pipe: Any) -> Iterator[None]:
    """Within it, nothing of a pipeline looks at images: what can be left out is, and of the rest those methods do nothing."""
    looking = {
        name: part
        for name, part in vars(pipe).items()
        if any(override in name for override in LOOKING) and part is not None and not isinstance(part, (bool, str))
    }
    with ExitStack() as stack:
        for name, part in looking.items():
            checks = [method for method in dir(type(part)) if method.startswith("check_")]
            if methods := [method for method in checks if any(override in method for override in LOOKS_AT)]:
                for method in methods:
                    stack.enter_context(patched(part, method, lambda own, owner, images, *_, **__: images))
            else:
                vars(pipe)[name] = None  # not by `setattr`, which changes the pipeline's configuration too
                stack.callback(vars(pipe).__setitem__, name, part)
        yield


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Images `[n, 1 or 3, height, width]` in [-1, 1] from latents that `undecoded` kept; of a video, its first frame.

    Latents of a pipeline without a decoder are images.

    Raises:
        UserError: they cannot be decoded without the pipeline.
    """
    decoders = decoders_of(pipe)
    images = _decoded(pipe, decoders[0], latents) if decoders else latents
    if images.ndim == 5:
        images = images[:, :, 0]
    if images.ndim != 4:
        raise UserError(f"{type(pipe).__name__}: makes no images but {list(images.shape[1:])}: {RECORDED_ONLY}")
    return images[:, : 3 if images.shape[1] >= 3 else 1].clamp(-1, 1)


def _decoded(pipe: Any, decoder: Any, latents: Tensor) -> Tensor:
    options = _OPTIONS.get(decoder, {})
    try:
        return decoder.decode(latents, **options)[0]
    except (RuntimeError, ValueError, TypeError) as error:
        if latents.ndim == 5:  # of videos that are decoded frame by frame, as the scheduler steps them
            channels = decoder.config.get("latent_channels")
            frames = latents[:, :, 0] if latents.shape[1] == channels else latents[:, 0]
            one = {name: 1 if name == "num_frames" else value for name, value in options.items()}
            return decoder.decode(frames / decoder.config.get("scaling_factor", 1.0), **one)[0]
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{type(pipe).__name__}: its latents cannot be decoded alone ({reason}): {RECORDED_ONLY}"
        ) from error
