"""The memory model against real memory, for a small UNet on a CPU, and the goals."""

from __future__ import annotations

import gc
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from stages.train.quantization import LIBRARIES
from tests.benchmarks import training_memory
from tests.benchmarks.tiny_shapes import shape_named
from tests.benchmarks.training_memory import GOALS, HELD, Setup, Training, main, modelled
from tests.support.real_shapes import TOKENS, Shape, on_meta, parameters

CLEAR_REFS = Path("/proc/self/clear_refs")


def small_unet() -> UNet2DConditionModel:
    """Make a UNet with SDXL's layout and 48 M parameters."""
    return UNet2DConditionModel(
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 4],
        attention_head_dim=[2, 4, 8],
        cross_attention_dim=256,
        use_linear_projection=True,
    )


SMALL = Shape("small", "small", small_unet, (4, 80, 80), {TOKENS: [77, 256]})


def resident(field: str) -> int:
    """Return the bytes of this process now (`VmRSS`), or their peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measured(setup: Setup) -> tuple[int, int]:
    """Return the bytes between two steps and at the peak of one, above those before the student was made."""
    torch.set_num_threads(1)
    few = replace(setup.shape, latent=(4, 16, 16))
    Training(replace(setup, shape=few), "cpu").step()  # loads the kernels' code, which does not count
    gc.collect()
    before = resident("VmRSS")
    training = Training(setup, "cpu")
    training.step()
    at_rest = resident("VmRSS")
    CLEAR_REFS.write_text("5")  # resets the peak
    training.step()
    return at_rest - before, resident("VmHWM") - before


@pytest.mark.long
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux reports the peak of one step")
@pytest.mark.parametrize(
    ("quantization", "gradient_checkpointing"),
    [("none", False), ("none", True), ("int8", True), ("fp8", True), ("nf4", True)],
)
def test_the_model_agrees_with_a_measured_run(
    monkeypatch: pytest.MonkeyPatch, quantization: str, gradient_checkpointing: bool
) -> None:
    """The bytes that a step adds agree within 10%.

    Those between steps agree within 12%, because the process's own objects are included.
    """
    if quantization != "none":
        pytest.importorskip(LIBRARIES[quantization])
    for threshold in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(threshold, str(1 << 16))  # freed memory returns to the system at once
    setup = Setup(SMALL, "lora", quantization, "no", gradient_checkpointing)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        at_rest, peak = fresh.submit(measured, setup).result()
    model = modelled(setup)
    resting = model["base"] + model["adapter"] + model["optimizer"]
    assert model["peak"] - resting == pytest.approx(peak - at_rest, rel=0.1)
    assert model["peak"] == pytest.approx(peak, rel=0.12)


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "held"), [(config, held) for (config, _), limits in GOALS.items() for held in limits]
)
def test_goals_are_met(config: str, held: str) -> None:
    setup = Setup.holding(shape_named(config), held)
    model = modelled(setup)
    bytes_per_weight = {"none": 2, "int8": 1, "nf4": 0.5, "offload": 0}[held]
    assert model["base"] >= bytes_per_weight * parameters(on_meta(config))
    assert model["activations"] <= sum(model["blocks"].values()) < 2 * model["activations"]
    assert model["peak"] >= sum(model[part] for part in ("base", "adapter", "optimizer", "activations"))
    assert model["peak"] <= GOALS[config, "lora"][held]


def test_the_stored_results_meet_their_goals() -> None:
    rows = json.loads((Path(__file__).parent / "results" / "memory" / "goals.json").read_text())["rows"]
    assert [(row["held"], row["goal"]) for row in rows] == [
        goal for limits in GOALS.values() for goal in limits.items()
    ]
    assert all(row["peak"] <= row["goal"] for row in rows)


@pytest.mark.parametrize("held", HELD)
def test_each_way_to_hold_the_base_is_modelled(held: str) -> None:
    plain, other = (modelled(Setup.holding(shape_named("tiny_sd3"), way)) for way in ("none", held))
    if held != "int4":  # whose kernel pads layers as narrow as these to a width of 1,024
        assert (other["base"] < plain["base"]) == (held != "none")
    assert other["adapter"] == plain["adapter"]


@pytest.mark.parametrize(("goal", "kept"), [(1 << 30, True), (1 << 10, False)])
def test_a_missed_goal_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], goal: int, kept: bool
) -> None:
    monkeypatch.setattr(training_memory, "GOALS", {("tiny_sdxl", "offset"): {"none": goal}})
    if kept:
        main("tiny_sdxl", "offset", "none")
    else:
        with pytest.raises(SystemExit, match="tiny SDXL, offset: the peak is above its goal"):
            main("tiny_sdxl", "offset", "none")
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["held"], row["goal"]) == ("none", goal)
    assert row["peak"] > row["model"]["base"] > 0
