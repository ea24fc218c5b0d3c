from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import DiTPipeline, QwenImagePipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, WanPipeline

from stages.errors import UsageError
from stages.generate.call_arguments import check_arguments
from stages.generate.config import TeacherConfig
from stages.generate.plan import Plan
from tests.conftest import generate_config
from tests.support.families import save

TEACHER = TeacherConfig("somewhere", height=64)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (StableDiffusionPipeline, {"num_inference_steps": 4}, "num_inference_steps: .*: say num_inference_steps="),
        (StableDiffusionPipeline, {"timesteps": [9, 5]}, "timesteps: .*: say num_inference_steps="),
        (StableDiffusionPipeline, {"sigmas": [1.0]}, "sigmas: .*: say num_inference_steps="),
        (StableDiffusionPipeline, {"guidance_scale": 7.5}, r"guidance_scale: .*: say guidance_scale=\["),
        (QwenImagePipeline, {"true_cfg_scale": 4}, r"true_cfg_scale: .*: say guidance_scale=\["),
        (None, {"guidance_scale": 4}, r"guidance_scale: .*: say guidance_scale=\["),
        (StableDiffusionPipeline, {"prompt": "x"}, "prompt: .*: say prompts=FILE"),
        (DiTPipeline, {"class_labels": [3]}, "class_labels: .*: say class_labels="),
        (StableDiffusionPipeline, {"generator": 3}, "generator: .*: say seed="),
        (StableDiffusionPipeline, {"latents": [0.0]}, "latents: .*: say seed="),
        (StableDiffusionPipeline, {"output_type": "pil"}, "output_type: .*: leave it out"),
        (StableDiffusionPipeline, {"return_dict": False}, "return_dict: .*: leave it out"),
        (StableDiffusionPipeline, {"callback_on_step_end": "f"}, "callback_on_step_end: .*: leave it out"),
        (StableDiffusionPipeline, {"num_images_per_prompt": 2}, ".*: say num_trajectories_per_condition="),
        (WanPipeline, {"num_videos_per_prompt": 2}, ".*: say num_trajectories_per_condition="),
        (StableDiffusionPipeline, {"prompt_embeds": [[0.0]]}, "prompt_embeds: .*: say prompts=FILE"),
        (StableDiffusionPipeline, {"height": 32}, "height: decided by teacher.height=64: leave one of them out"),
        (StableDiffusionPipeline, {"negative_promt": "x"}, "negative_promt: .* did you mean negative_prompt"),
        (StableDiffusionPipeline, {"zzz": 1}, "zzz: StableDiffusionPipeline takes no such argument: leave it out"),
        (StableDiffusionPipeline, {"negative_prompt": False}, "negative_prompt=False: not a text: put it into quotes"),
        (None, {"negative_prompt": 7}, "negative_prompt=7: not a text: put it into quotes"),
        (StableDiffusionXLPipeline, {"negative_prompt_2": True}, "negative_prompt_2=True: not a text"),
    ],
)
def test_an_invalid_call_argument_is_refused_by_its_name(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^teacher.call.{message}") as error:
        check_arguments(kind, arguments, TEACHER)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (StableDiffusionPipeline, {"guidance_rescale": 0.7, "width": 32, "negative_prompt": "grey", "eta": 0.5}),
        (StableDiffusionXLPipeline, {"original_size": [64, 64], "clip_skip": 1}),
        (QwenImagePipeline, {"guidance_scale": 3.5, "max_sequence_length": 32}),
        (WanPipeline, {"num_frames": 5, "guidance_scale_2": 3.0}),
        (None, {"anything": 3}),
    ],
)
def test_a_valid_call_argument_is_accepted(kind: Any, arguments: dict[str, Any]) -> None:
    check_arguments(kind, arguments, TEACHER)


def test_an_invalid_argument_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = save("stable_diffusion", tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    config = generate_config(folder, tmp_path, prompts=str(tmp_path / "prompts.txt"))
    config.teacher.call = {"guidance_scale": 7.5}
    with pytest.raises(UsageError, match=r"teacher\.call\.guidance_scale"):
        Plan(config)
