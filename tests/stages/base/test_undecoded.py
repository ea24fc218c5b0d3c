from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from torch import nn

from stages.base.denoiser import fingerprint
from stages.base.sampling import Request, decode, sample, undecoded
from stages.base.undecoded import decoders_of
from stages.errors import UserError
from tests.conftest import tiny_dit
from tests.pipelines_zoo.gathered import gather
from tests.support.families import ARGUMENTS, PROMPTS, build

ZOO = gather()
ONE = Request([{"prompt": PROMPTS[0]}], [0], 2, {})


def images_of(pipe: Any, **options: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(PROMPTS, generator=generators, num_inference_steps=2, output_type="pt", **options).images


class Flagging(nn.Module):
    """A safety checker that blanks its images, and keeps their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, images: Any, **_: Any) -> tuple[Any, list[bool]]:
        self.seen.append(images.shape)
        return images * 0, [True] * len(images)


@pytest.mark.parametrize(
    "name", ["IFPipeline", "LDMTextToImagePipeline", "Kandinsky3Pipeline", "AnimateDiffPipeline", "TextToVideoSDPipeline",
             "AudioLDM2Pipeline", "KandinskyV22CombinedPipeline", "StableDiffusionPAGPipeline"]
)  # fmt: skip
def test_with_any_decoder_or_none_the_latents_are_kept_and_the_pipeline_is_restored(name: str) -> None:
    specimen = ZOO[name]
    pipe = specimen.build()
    before = {n: fingerprint(part) for n, part in pipe.components.items() if isinstance(part, nn.Module)}
    parts = [*decoders_of(pipe), pipe.scheduler]
    held = [set(vars(part)) for part in parts]
    request = Request([dict(c) for c in specimen.conditions], [0, 1], 2, dict(specimen.arguments))
    with undecoded(pipe) as kept:
        sample(pipe, request, 3.0)
    assert len(kept) == 1
    assert len(kept[0]) == 2
    shown = decode(pipe, kept[0])
    assert shown.ndim == 4
    assert len(shown) == 2
    assert shown.shape[1] in (1, 3)
    assert float(shown.std()) > 0
    assert before == {n: fingerprint(part) for n, part in pipe.components.items() if isinstance(part, nn.Module)}
    assert [set(vars(part)) for part in parts] == held or name == "AudioLDM2Pipeline"


def test_without_a_decoder_the_latents_are_the_images() -> None:
    specimen = ZOO["IFPipeline"]
    pipe = specimen.build()
    conditions = [dict(condition) for condition in specimen.conditions]
    arguments = dict(specimen.arguments) | {"prompt": [c["prompt"] for c in conditions], "guidance_scale": 3.0}
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    images = pipe(**arguments, generator=generators, num_inference_steps=2, output_type="pt").images
    with undecoded(pipe) as kept:
        sample(pipe, Request(conditions, [0, 1], 2, dict(specimen.arguments)), 3.0)
    torch.testing.assert_close(decode(pipe, kept[0]), images.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_checkers_and_watermarks_are_skipped_until_there_are_images() -> None:
    pipe: Any = build("stable_diffusion")
    plain = images_of(pipe, guidance_scale=3.0)
    checker = Flagging()
    pipe.safety_checker = pipe.watermark = checker
    config = dict(pipe.config)
    with undecoded(pipe) as kept:
        sample(pipe, Request([{"prompt": p} for p in PROMPTS], [0, 1], 2, {}), 3.0)
        assert pipe.safety_checker is None
    assert checker.seen == []
    assert pipe.safety_checker is pipe.watermark is checker
    assert dict(pipe.config) == config
    torch.testing.assert_close((decode(pipe, kept[0]) + 1) / 2, plain, atol=1e-4, rtol=1e-4)


def test_a_checker_of_prompts_still_checks_them() -> None:
    class Checker(nn.Module):
        def check_text_safety(self, prompt: str) -> bool:
            return len(prompt) > 3

        def check_video_safety(self, frames: Any) -> Any:
            raise AssertionError("there is no video")

    pipe = build("stable_diffusion")
    vars(pipe)["safety_checker"] = Checker()
    with undecoded(pipe):
        assert pipe.safety_checker.check_text_safety("abcd")
        assert not pipe.safety_checker.check_text_safety("a")
        assert pipe.safety_checker.check_video_safety("frames") == "frames"
    with pytest.raises(AssertionError):
        pipe.safety_checker.check_video_safety("frames")


def test_an_error_after_the_last_step_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, freed = build("stable_diffusion"), []

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no images")

    monkeypatch.setattr(pipe.image_processor, "postprocess", broken)
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    with undecoded(pipe) as kept:
        sample(pipe, ONE, 3.0)
    assert kept[0].shape == (1, 4, 8, 8)
    assert freed == [1]
    with pytest.raises(RuntimeError, match="no images"):
        sample(pipe, ONE, 3.0)


@pytest.mark.parametrize("error", [RuntimeError("at the first step"), UserError("at the last step")])
def test_an_error_before_the_end_of_the_last_step_ends_a_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("stable_diffusion")
    calls: list[int] = []
    step = type(pipe.scheduler).step

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if isinstance(error, UserError) == (len(calls) == 2):
            raise error
        return step(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", broken)
    with pytest.raises(type(error)), undecoded(pipe):
        sample(pipe, ONE, 3.0)


def test_the_clock_stops_at_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, times = build("stable_diffusion"), []
    postprocess = pipe.image_processor.postprocess
    monkeypatch.setattr(
        pipe.image_processor, "postprocess", lambda *a, **k: times.append(time.perf_counter()) or postprocess(*a, **k)
    )
    for scheduler in (DDIMScheduler, HeunDiscreteScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        start = time.perf_counter()
        with undecoded(pipe) as kept:
            sample(pipe, ONE, 3.0)
        assert kept.ended is not None
        assert start < kept.ended < times[-1]


def test_blanks_have_the_shape_of_the_images() -> None:
    pipe, shapes = build("stable_diffusion"), []
    postprocess = pipe.image_processor.postprocess
    pipe.image_processor.postprocess = lambda image, **options: (
        shapes.append(image.shape) or postprocess(image, **options)
    )
    with undecoded(pipe):
        sample(pipe, ONE, 3.0)
    assert shapes == [(1, 3, 32, 32)]


def test_each_run_within_the_context_keeps_its_latents() -> None:
    pipe = tiny_dit()
    with undecoded(pipe) as kept:
        for seed in range(2):
            sample(pipe, Request([{"class_label": 1}], [seed], 3, {}), 2.0)
    assert [latents.shape for latents in kept] == [(1, 4, 8, 8)] * 2
    assert not torch.allclose(kept[0], kept[1])


def test_an_output_other_than_images_is_named() -> None:
    pipe = ZOO["StableAudioPipeline"].build()
    with pytest.raises(
        UserError, match=r"StableAudioPipeline: makes no images but \[2, 31\]: it can be recorded, with preview=0"
    ):
        decode(pipe, torch.zeros(1, 4, 16))


def test_a_video_is_shown_by_its_first_frame(tmp_path: Path) -> None:
    pipe = build("wan")
    with undecoded(pipe) as kept:
        sample(pipe, Request([{"prompt": PROMPTS[0]}], [0], 2, ARGUMENTS["wan"]), 1.0)
    assert kept[0].ndim == 5
    assert decode(pipe, kept[0]).shape == (1, 3, 32, 32)
