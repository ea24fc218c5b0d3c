"""Sampling without decoding: keep the final latents and skip decoders, safety checkers and watermarks."""

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

from stages.base.decoder_input import follows_convention
from stages.base.patching import patched, replaced
from stages.base.size import VIDEO_DIMS
from stages.errors import UserError

RECORDED_ONLY = "it can be recorded, with preview=0, and trained on, but not shown"
CHECKERS = ("safety_checker", "watermark")  # in the names of parts that inspect images
IMAGE_WORDS = ("image", "video", "frame")  # in the names of a checker's methods for images; others check prompts


class Kept(list[Tensor]):
    """The final latents `[n, ...]` of each run of a pipeline.

    These are the decoder's input where it has an entry per sample, else the latents of the scheduler's last step.

    Attributes:
        ended: the clock (`time.perf_counter`) after the last step of the last run; None during a run.
        stepped: the latents of the scheduler's last step; empty before it.
        decoded: the shapes of what the decoder would have returned, call by call; None where one is unknown.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ended: float | None = None
        self.stepped = torch.empty(0)
        self.decoded: list[torch.Size | None] = []
        self.steps = self.rows = 0
        self._handed: list[Tensor] = []
        self._stepped: set[int] = set()  # the schedulers of this run

    def begin(self, scheduler: Any) -> None:
        """A scheduler sets its timesteps; if it has stepped in this run, another run begins."""
        if id(scheduler) in self._stepped:
            self._stepped.clear()
        self.steps = 0

    def step(self, scheduler: Any, latents: Tensor) -> None:
        if not self._stepped:
            self.append(latents)
        self._stepped.add(id(scheduler))
        self[-1] = self.stepped = latents
        self.rows, self._handed = len(latents), []
        self.steps += 1
        self.ended = None

    def end(self, pipe: Any) -> None:
        """Stop the clock: the last step is done, or decoding begins."""
        if self.ended is None:
            synchronize(pipe)
            self.ended = time.perf_counter()

    def hand(self, latents: Tensor) -> None:
        """A decoder receives latents, perhaps only some samples or frames."""
        self._handed.append(latents)
        if not self._stepped:
            self.append(latents)
        elif sum(map(len, self._handed)) <= self.rows:
            self[-1] = torch.cat(self._handed) if len(self._handed) > 1 else latents


_WATCHED: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()
_SHAPES: WeakKeyDictionary[nn.Module, dict[Any, torch.Size | None]] = WeakKeyDictionary()
_OPTIONS: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


@contextmanager
def undecoded(pipe: Any) -> Iterator[Kept]:
    """Within the context, the pipeline's decoders return blanks of the right shape, and no checker inspects them.

    The list keeps the final latents of each run.
    """
    kept, before = Kept(), _WATCHED.get(pipe)
    decoders = decoders_of(pipe)
    with ExitStack() as stack:
        for part in {id(part): part for part in pipe.components.values() if isinstance(part, SchedulerMixin)}.values():
            _watch(pipe, part, kept, stack)
        for i, decoder in enumerate(decoders):
            stack.enter_context(patched(decoder, "decode", _blank_decode(pipe, kept, is_main=i == 0)))
        stack.enter_context(_unchecked(pipe))
        _WATCHED[pipe] = kept
        try:
            yield kept
        finally:
            del _WATCHED[pipe]
            if before is not None:
                _WATCHED[pipe] = before


@contextmanager
def up_to_images(pipe: Any, n: int) -> Iterator[None]:
    """Within the context and that of `undecoded`, ignore errors of the pipeline after its last step.

    Args:
        n: the number of samples; where a pipeline puts frames into the batch, the latents are
            kept as `[n, frames, ...]`.
    """
    kept = _WATCHED.get(pipe)
    try:
        yield
    except UserError:
        raise
    except Exception:
        if kept is None or kept.ended is None:
            raise
        getattr(pipe, "maybe_free_model_hooks", lambda: None)()  # the pipeline's own last call, which the error skipped
    if kept and len(kept[-1]) > n and len(kept[-1]) % n == 0:
        kept[-1] = kept[-1].unflatten(0, (n, -1))


def synchronize(pipe: Any) -> None:
    """Wait for the GPU, so that a clock read afterwards includes its work."""
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()


def decoders_of(pipe: Any) -> list[nn.Module]:
    """The parts of a pipeline that decode latents (`vae`, `movq`, `vqgan`, ...), the image decoder first."""
    found = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    decoders = {name: part for name, part in found.items() if callable(getattr(part, "decode", None))}
    return [decoders[name] for name in sorted(decoders, key=lambda name: name != "vae")]


def _watch(pipe: Any, scheduler: Any, kept: Kept, stack: ExitStack) -> None:
    """Report a scheduler's steps to `kept`; copies of the scheduler are not watched."""

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


def _blank_decode(pipe: Any, kept: Kept, is_main: bool) -> Callable[..., Any]:
    """A `decode` that keeps its input and returns a blank."""

    def decode(own: Any, decoder: Any, z: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        kept.end(pipe)
        _OPTIONS[decoder] = {name: value for name, value in kwargs.items() if isinstance(value, (bool, int, float))}
        shapes = _SHAPES.setdefault(decoder, {})
        key = (z.shape, tuple(sorted(_OPTIONS[decoder].items())))
        if key not in shapes:
            shapes[key] = _shape_of_decoded(decoder, z, args, kwargs)
        if is_main:
            kept.hand(z)
            kept.decoded.append(shapes[key])
        blank = torch.zeros((), dtype=z.dtype, device=z.device).expand(shapes[key] or z.shape)
        return DecoderOutput(sample=blank) if return_dict else (blank,)

    return decode


def _shape_of_decoded(decoder: Any, z: Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Size | None:
    """The shape that the decoder would return, found on the meta device; None where that fails."""
    named = {name: _on_meta(value) for name, value in kwargs.items() if name != "generator"}
    try:
        with torch.device("meta"), torch.no_grad():
            twin = type(decoder).from_config(decoder.config).to(z.dtype)
            return twin.decode(_on_meta(z), *map(_on_meta, args), **named)[0].shape
    except Exception:
        return None


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@contextmanager
def _unchecked(pipe: Any) -> Iterator[None]:
    """Within the context, no part of a pipeline inspects images: it is removed, or its `check_` methods do nothing."""
    checkers = {
        name: part
        for name, part in vars(pipe).items()
        if any(word in name for word in CHECKERS) and part is not None and not isinstance(part, (bool, str))
    }
    with ExitStack() as stack:
        for name, part in checkers.items():
            checks = [method for method in dir(type(part)) if method.startswith("check_")]
            if methods := [method for method in checks if any(word in method for word in IMAGE_WORDS)]:
                for method in methods:
                    stack.enter_context(patched(part, method, lambda own, owner, images, *_, **__: images))
            else:
                stack.enter_context(replaced(pipe, name, None))
        yield


def shape_of_images(kept: Kept) -> torch.Size | None:
    """The shape of the images or videos of a run, `[n, c, height, width]` or `[n, c, frames, height, width]`.

    The frames are left out where they are decoded in several calls. None where the shape is unknown.
    """
    shape = kept.decoded[-1] if kept.decoded else None
    if shape is not None and len(kept.decoded) > 1 and len(shape) == VIDEO_DIMS:
        return torch.Size([*shape[:2], *shape[3:]])
    return shape


def decoder_input_of(pipe: Any, kept: Kept) -> list[int] | None:
    """The shape of what the decoder receives of one sample, such as `[c, height, width]`.

    None where more happens to the latents of the scheduler's last step than `to_decoder_input` does.
    """
    decoders, received = decoders_of(pipe), kept[-1][:1]
    config: Any = decoders[0].config if decoders else {}
    if decoders and follows_convention(config, kept.stepped[:1], received):
        return list(received.shape[1:])
    return None


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Images `[n, 1 or 3, height, width]` in [-1, 1] from latents that `undecoded` kept; the first frame of a video.

    Without a decoder, a pipeline's latents are images.

    Raises:
        UserError: decoding them needs more than the decoder.
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
        if latents.ndim == 5:  # of a video that the pipeline decodes frame by frame
            channels = decoder.config.get("latent_channels")
            frames = latents[:, :, 0] if latents.shape[1] == channels else latents[:, 0]
            one = {name: 1 if name == "num_frames" else value for name, value in options.items()}
            return decoder.decode(frames / decoder.config.get("scaling_factor", 1.0), **one)[0]
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{type(pipe).__name__}: its latents cannot be decoded alone ({reason}): {RECORDED_ONLY}"
        ) from error
