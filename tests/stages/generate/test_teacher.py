from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.base.hooks import count_evaluations
from stages.base.loading import new_guider
from stages.base.sampling import Request, sample, undecoded
from stages.errors import UserError
from stages.generate.config import TRAJECTORIES
from stages.generate.noising import noise_of
from stages.generate.plan import Plan
from stages.generate.teacher import Teacher, dtype_named
from tests.conftest import generate_config
from tests.support.families import PROMPTS, save


def teacher(folder: Path, **changes: Any) -> tuple[Teacher, Plan]:
    config = generate_config(folder, Path("nowhere"), **changes)
    plan = Plan(config)
    return Teacher(config, plan.examples), plan


def test_a_unit_yields_its_trajectories_in_order(tiny_teacher: Path) -> None:
    made, plan = teacher(tiny_teacher)
    trajectories = made.run(plan.unit(1)).trajectories
    assert [t.index for t in trajectories] == [3, 4, 5]
    for t, planned in zip(trajectories, plan.unit(1).trajectories, strict=True):
        assert (t.scale, t.seed) == (planned.guidance_scale, planned.seed)
        assert t.condition == planned.condition
        assert int(t.cond["class_labels"]) == planned.condition["class_label"]
        assert t.latent.shape == t.target.shape == (4, 4, 8, 8)
        assert t.latent.dtype == t.target.dtype == torch.float16


def test_the_effect_of_guidance_is_measured_before_records_are_rounded(tiny_teacher: Path) -> None:
    (half, plan), (whole, _) = teacher(tiny_teacher), teacher(tiny_teacher, storage_dtype="float32")
    for rounded, exact in zip(half.run(plan.unit(0)).trajectories, whole.run(plan.unit(0)).trajectories, strict=True):
        for name in ("guidance_cosine", "guidance_delta"):
            assert getattr(rounded, name).shape == (4,)
            assert getattr(rounded, name).dtype == torch.float32
            assert torch.equal(getattr(rounded, name), getattr(exact, name))
        assert not torch.equal(rounded.target.float(), exact.target)


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_the_batch_size_changes_nothing_but_rounding(tiny_teacher: Path, trajectory: str) -> None:
    together, plan = teacher(tiny_teacher, trajectory=trajectory, storage_dtype="float32")
    separate, _ = teacher(tiny_teacher, trajectory=trajectory, storage_dtype="float32", batch_size=2)
    for one, other in zip(
        together.run(plan.unit(0)).trajectories, separate.run(plan.unit(0)).trajectories, strict=True
    ):
        torch.testing.assert_close(one.latent, other.latent, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(one.target, other.target, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(one.guidance_cosine, other.guidance_cosine, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.guidance_delta, other.guidance_delta, atol=1e-9, rtol=1e-3)
        assert torch.equal(one.timestep, other.timestep)


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_a_unit_made_twice_has_the_same_bytes(tiny_teacher: Path, trajectory: str) -> None:
    (one, plan), (other, _) = (teacher(tiny_teacher, trajectory=trajectory) for _ in range(2))
    first, second = ([t.to_members() for t in made.run(plan.unit(0)).trajectories] for made in (one, other))
    assert first == second


def test_diffusion_trajectories_hold_the_same_steps_of_other_latents(tiny_teacher: Path) -> None:
    (guided, plan), (diffusion, _) = (
        teacher(tiny_teacher, preview=3),
        teacher(tiny_teacher, preview=3, trajectory="diffusion"),
    )
    first, second = guided.run(plan.unit(0)), diffusion.run(plan.unit(0))
    for one, other in zip(first.trajectories, second.trajectories, strict=True):
        assert (one.index, one.seed, one.scale) == (other.index, other.seed, other.scale)
        assert torch.equal(one.timestep, other.timestep)
        assert one.latent.shape == other.latent.shape
        assert not any(torch.allclose(x, y, atol=0.1) for x, y in zip(one.latent, other.latent, strict=True))
    assert first.previews.keys() == second.previews.keys() == {0, 1, 2}
    assert all(torch.equal(first.previews[i], second.previews[i]) for i in range(3))


def test_diffusion_trajectories_are_noised_from_the_samples_of_the_guided_run(tiny_teacher: Path) -> None:
    made, plan = teacher(tiny_teacher, trajectory="diffusion", storage_dtype="float32", shift_timesteps=False)
    unit = plan.unit(0)
    alphas = made.pipe.scheduler.alphas_cumprod
    for planned, found in zip(unit.trajectories, made.run(unit).trajectories, strict=True):
        with undecoded(made.pipe) as latents:
            sample(made.pipe, Request([planned.condition], [planned.seed], 4, {}), planned.guidance_scale)
        clean = latents[0][0] * made.pipe.vae.config.scaling_factor
        for step, (latent, timestep) in enumerate(zip(found.latent, found.timestep, strict=True)):
            noise = noise_of([planned.seed], step, clean[None])[0]
            expected = alphas[timestep] ** 0.5 * clean + (1 - alphas[timestep]) ** 0.5 * noise
            torch.testing.assert_close(latent, expected, atol=1e-4, rtol=1e-4)


def test_a_teacher_whose_scheduler_cannot_noise_is_refused_at_load(tiny_teacher: Path) -> None:
    config = generate_config(tiny_teacher, Path("nowhere"), trajectory="diffusion")
    config.teacher = replace(config.teacher, scheduler="IPNDMScheduler")
    with pytest.raises(UserError, match="IPNDMScheduler: adds no noise"):
        Teacher(config, [{"class_label": 1}])


def test_units_use_shifted_grids(tiny_teacher: Path) -> None:
    made, plan = teacher(tiny_teacher)
    grids = [made.run(plan.unit(i)).trajectories[0].timestep for i in range(4)]
    assert len({tuple(grid.tolist()) for grid in grids}) == 4
    assert all(torch.equal(grid.diff(), torch.full((3,), -250)) for grid in grids)


def test_a_nan_names_its_trajectory_and_step(tiny_teacher: Path) -> None:
    made, plan = teacher(tiny_teacher)
    step = made.pipe.scheduler.step
    calls = []

    def broken(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        result = step(model_output, *args, **kwargs)
        if len(calls) == 2:
            result.prev_sample[1] = float("nan")
        return result

    made.pipe.scheduler.step = broken
    with pytest.raises(UserError, match="trajectory 4, step 2: the teacher's latent is not finite"):
        made.run(plan.unit(1))


def test_an_overflow_in_storing_names_the_tensor(tiny_teacher: Path) -> None:
    made, plan = teacher(tiny_teacher)
    with torch.no_grad():
        made.pipe.transformer.proj_out_2.bias.fill_(1e5)
    with pytest.raises(
        UserError, match="trajectory 3, step 1: the teacher's latent does not fit into storage_dtype=float16"
    ):
        made.run(plan.unit(1))


def test_facts_distinguish_weights(tiny_teacher: Path, other_teacher: Path) -> None:
    (one, _), (other, _) = teacher(tiny_teacher), teacher(other_teacher)
    assert one.facts() == teacher(tiny_teacher)[0].facts()
    assert one.facts().denoiser_fingerprint != other.facts().denoiser_fingerprint
    assert one.facts().scheduler_class == "DDIMScheduler"


def test_a_mistyped_dtype_is_refused() -> None:
    assert dtype_named("bfloat16", "storage_dtype") == torch.bfloat16
    with pytest.raises(UserError, match="storage_dtype=half: one of float32, float16, bfloat16"):
        dtype_named("half", "storage_dtype")


def text_teacher(tmp_path: Path, **options: Any) -> Teacher:
    config = generate_config(save("stable_diffusion", tmp_path / "teacher"), tmp_path)
    config.teacher = replace(config.teacher, **options)
    return Teacher(config, [{"prompt": PROMPTS[0]}])


def test_call_arguments_reach_the_pipeline(tmp_path: Path) -> None:
    made = text_teacher(tmp_path, call={"guidance_rescale": 0.5}, height=64, scheduler="DDIMScheduler")
    assert made.arguments == {"guidance_rescale": 0.5, "height": 64}
    assert made.facts().guidance_rule["guidance_rescale"] == 0.5
    assert made.facts().scheduler_class == "DDIMScheduler"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"call": {"negative_promt": "x"}}, "teacher.call.negative_promt: .* did you mean negative_prompt"),
        ({"scheduler": "MagicScheduler"}, "teacher.scheduler=MagicScheduler: diffusers .* has no such class"),
        ({"scheduler": "AutoencoderKL"}, "teacher.scheduler=AutoencoderKL: no scheduler"),
        ({"pipeline_class": "NoPipeline"}, "teacher.pipeline_class=NoPipeline"),
        ({"guider": {"name": "AutoencoderKL"}}, "no guider"),
        ({"guider": {"name": "AdaptiveProjectedGuidance", "etta": 1}}, "AdaptiveProjectedGuidance does not take that"),
        ({"offload_text_encoder": True}, "there is no GPU"),
    ],
)
def test_an_invalid_teacher_option_is_named(tmp_path: Path, options: Any, message: str) -> None:
    if "guider" in options:
        with pytest.raises(UserError, match=message):
            new_guider(dict(options["guider"]))
        return
    with pytest.raises(UserError, match=message):
        text_teacher(tmp_path, **options)


@pytest.mark.parametrize(("trajectory", "runs"), [("guided", 1), ("diffusion", 2)])
def test_the_evaluations_of_a_third_pass_are_counted(tmp_path: Path, trajectory: str, runs: int) -> None:
    """Three trial steps show nothing of a pass that acts at the second and third of ten steps alone."""
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    config = generate_config(
        save("stable_diffusion_3", tmp_path / "teacher"), tmp_path / "data", prompts=str(tmp_path / "prompts.txt"),
        num_inference_steps=10, num_trajectories=1, trajectory=trajectory,
    )  # fmt: skip
    third = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.3}
    config.teacher = replace(config.teacher, height=32, width=32, call={"max_sequence_length": 32} | third)
    made, plan = Teacher(config, [{"prompt": PROMPTS[0]}]), Plan(config)
    assert made.layout.parts == ((2,), (2, 1))
    with count_evaluations(made.pipe.transformer) as count:
        made.run(plan.unit(0))
    assert made.evaluations_per_trajectory == count[0] == runs * (2 * 10 + 2)


def test_a_guider_makes_the_modular_pipeline_the_teacher(tmp_path: Path) -> None:
    config = generate_config(save("stable_diffusion_xl", tmp_path / "teacher"), tmp_path)
    config.teacher = replace(config.teacher, guider={"name": "AdaptiveProjectedGuidance", "eta": 0.5})
    facts = Teacher(config, [{"prompt": PROMPTS[0]}]).facts()
    assert facts.guidance_rule["name"] == "AdaptiveProjectedGuidance"
    assert facts.guidance_rule["eta"] == 0.5
    assert facts.layout.calls == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_storage_dtype_is_independent_of_the_computing_dtype(tiny_teacher: Path, dtype: str) -> None:
    config = generate_config(tiny_teacher, Path("nowhere"), storage_dtype="float32")
    config.teacher = replace(config.teacher, torch_dtype=dtype)
    plan = Plan(config)
    made = Teacher(config, plan.examples)
    assert made.pipe.transformer.dtype == getattr(torch, dtype)
    trajectory = made.run(plan.unit(0)).trajectories[0]
    assert trajectory.latent.dtype == trajectory.target.dtype == torch.float32


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_only_the_planned_steps_are_recorded(tiny_teacher: Path, trajectory: str) -> None:
    recorded = {"num_inference_steps": 10, "num_recorded_steps": 3}
    made, plan = teacher(tiny_teacher, trajectory=trajectory, shift_timesteps=False, **recorded)
    made.pipe.scheduler.set_timesteps(10)
    grid = made.pipe.scheduler.timesteps
    for t, planned in zip(made.run(plan.unit(0)).trajectories, plan.unit(0).trajectories, strict=True):
        assert len(t) == 3
        assert t.timestep.tolist() == grid[planned.steps].tolist()
