from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from stages.adapters import GuidanceAdapter
from stages.errors import UserError
from stages.evaluate import comparisons
from stages.evaluate.comparisons import Setting
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Evaluation, Worker, gap_closed
from stages.evaluate.identity import scaling_of
from stages.evaluate.methods import CFG, CFG_FIRST_50, CFG_FIRST_60, NONE, ONE_PASS
from stages.evaluate.report import cells_of
from stages.evaluate.worker import check_finite, folder_name
from stages.train.trainer import Trainer
from tests.conftest import generate, generate_config, small_adapter, train_config
from tests.stages.evaluate.test_clip_score import save_tiny_clip
from tests.stages.evaluate.test_preference import save_scores
from tests.stages.evaluate.test_real_images import encoded, write_table
from tests.support.families import PROMPTS, save

TIMES = ("seconds_per_image", "time_relative_to_none")


def evaluation(adapter: Path | list[Path], output: Path, **changes: Any) -> Evaluation:
    options = {
        "num_samples": 6,
        "batch_size": 4,
        "num_inference_steps": 4,
        "guidance_scale": [2.0, 4.0],
        "device": "cpu",
    }
    folders = [str(folder) for folder in adapter] if isinstance(adapter, list) else str(adapter)
    return Evaluation(EvaluateConfig(adapter_dir=folders, output_dir=str(output), **(options | changes)))


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """An evaluation that ran without interruption."""
    run = evaluation(tiny_adapter, tmp_path_factory.mktemp("evaluation"))
    run.run()
    return run


@pytest.fixture(scope="module")
def other_adapter(shared_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "other"
    Trainer(train_config(shared_dataset, folder, adapter=small_adapter("offset"), max_train_steps=4)).run()
    return folder


def test_rows_hold_the_quality_and_cost_of_each_method(whole: Evaluation) -> None:
    rows = {Setting(row["method"], row["guidance_scale"], row["adapter"]): row for row in whole.rows}
    assert list(rows) == whole.settings
    assert {setting.method: row["denoiser_evaluations"] for setting, row in rows.items()} == {
        NONE: 4,
        CFG: 8,
        ONE_PASS: 4,
        CFG_FIRST_50: 6,
        CFG_FIRST_60: 7,  # ceil(2.4) of 4 steps twice
    }
    one_pass = rows[Setting(ONE_PASS, 2.0, "tiny")]
    assert one_pass["variant"] == "lora"
    assert {setting.method: row["fused"] for setting, row in rows.items()} == {
        NONE: None,
        CFG: None,
        ONE_PASS: True,
        CFG_FIRST_50: None,
        CFG_FIRST_60: None,
    }
    assert rows[Setting(NONE, 1.0)]["gap_closed"] == 0
    assert rows[Setting(CFG, 2.0)]["gap_closed"] == 1
    assert [row["effective_scale"] for row in rows.values() if row["method"] in (NONE, CFG)] == [1, 2, 4]
    assert all(row["seconds_per_image"] > 0 and row["frechet_distance"] > 0 for row in rows.values())
    assert all(0 <= row[name] <= 1 for row in rows.values() for name in ("class_accuracy", "precision", "recall"))
    assert whole.shown[one_pass_setting(2.0)].shape == (6, 1, 32, 32)
    info = {"variant", "parameters", "share", "adapter_fingerprint", "base", "num_samples", "num_inference_steps"}
    assert info <= whole.metadata.keys()


def one_pass_setting(scale: float) -> Setting:
    return Setting(ONE_PASS, scale, "tiny")


def test_gap_and_errors_are_those_of_the_latents(whole: Evaluation, tiny_adapter: Path) -> None:
    worker = evaluation(tiny_adapter, whole.folder).new_worker()
    worker.load()
    samples = [worker._sample(part)[0] for part in (range(4), range(4, 6))]
    none, cfg, one = (
        torch.cat([part[setting].latents for part in samples])
        for setting in (Setting(NONE, 1.0), Setting(CFG, 4.0), one_pass_setting(4.0))
    )
    rows = {Setting(row["method"], row["guidance_scale"], row["adapter"]): row for row in whole.rows}
    expected = 1 - (one - cfg).square().mean() / (none - cfg).square().mean()
    assert rows[one_pass_setting(4.0)]["gap_closed"] == pytest.approx(float(expected), rel=1e-4)
    (curve,) = rows[one_pass_setting(4.0)]["error_by_timestep"]
    assert curve["guidance_scale"] == 4
    assert curve["timestep"] == sorted(curve["timestep"], reverse=True)
    assert curve["error"][0] == 0 < curve["error"][1] < curve["error"][-1]
    (partial,) = rows[Setting(CFG_FIRST_50, 4.0)]["error_by_timestep"]
    assert partial["error"][:3] == pytest.approx([0, 0, 0], abs=1e-10)
    assert partial["error"][3] > 1e-6
    assert [curve["guidance_scale"] for curve in rows[Setting(NONE, 1.0)]["error_by_timestep"]] == [2, 4]
    assert rows[Setting(CFG, 2.0)]["error_by_timestep"] == []


def test_the_effective_scale_is_that_of_the_nearest_cfg(whole: Evaluation, tiny_adapter: Path, tmp_path: Path) -> None:
    """Compared with a search in small steps between CFG's latents; the order of the scales does not matter."""
    worker = evaluation(tiny_adapter, whole.folder).new_worker()
    worker.load()
    samples = worker._sample(range(6))[0]
    measured = [samples[setting].latents for setting in (Setting(NONE, 1.0), Setting(CFG, 2.0), Setting(CFG, 4.0))]
    rows = {Setting(row["method"], row["guidance_scale"], row["adapter"]): row for row in whole.rows}
    for setting in (one_pass_setting(2.0), one_pass_setting(4.0), Setting(CFG_FIRST_50, 4.0)):
        places = {
            low + share * (high - low): (a + share * (b - a) - samples[setting].latents).square().sum().item()
            for low, high, a, b in zip((1, 2), (2, 4), measured, measured[1:], strict=False)
            for share in torch.linspace(0, 1, 201).tolist()
        }
        assert rows[setting]["effective_scale"] == pytest.approx(min(places, key=lambda s: places[s]), abs=0.02)
    falling = evaluation(tiny_adapter, tmp_path, guidance_scale=[4.0, 2.0], methods=["one_pass"]).run()
    assert falling[4]["effective_scale"] == pytest.approx(rows[one_pass_setting(2.0)]["effective_scale"], abs=1e-4)


def test_only_missing_parts_are_made(
    whole: Evaluation, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = Worker.make
    monkeypatch.setattr(Worker, "make", lambda worker, part: (made.append(part), make(worker, part))[1])
    shutil.copytree(whole.folder / "parts", tmp_path / "parts")
    (tmp_path / "parts" / "00001.safetensors").write_bytes(b"cut off")
    again = evaluation(tiny_adapter, tmp_path)
    assert without_times(again.run()) == without_times(whole.rows)
    assert made == [1]
    evaluation(tiny_adapter, tmp_path).run()
    assert made == [1]


def test_an_evaluation_with_another_scheduler_is_the_same_in_each_process(tiny_adapter: Path, tmp_path: Path) -> None:
    """diffusers lists the scheduler's default values in the order of a set, which each process hashes anew."""
    worker = evaluation(tiny_adapter, tmp_path / "out", scheduler="DPMSolverMultistepScheduler").new_worker()
    identity = worker.load().identity
    defaults = worker.pipe.scheduler.config["_use_default_values"]
    worker.pipe.scheduler.register_to_config(_use_default_values=defaults[::-1])
    assert worker._facts().identity == identity


def test_settings_beside_the_weights_are_part_of_the_identity(text_adapter: Path, tmp_path: Path) -> None:
    """The VAE's scaling and a LoRA's alpha change the images, and no weight."""
    prompts = str(text_adapter.parent / "prompts.txt")
    worker = evaluation(text_adapter, tmp_path / "out", prompts=prompts, reference=None).new_worker()
    seen = [worker.load().identity]
    worker.pipe.vae.register_to_config(scaling_factor=0.5)
    seen.append(worker._facts().identity)
    worker.pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    seen.append(worker._facts().identity)
    next(filter(scaling_of, worker.pipe.unet.modules())).scaling["default"] = 7.0
    seen.append(worker._facts().identity)
    assert len(set(seen)) == 4


def test_another_evaluation_in_the_same_folder_is_refused_and_nothing_lost(
    whole: Evaluation, other_adapter: Path, tmp_path: Path, tiny_adapter: Path
) -> None:
    shutil.copytree(whole.folder, tmp_path / "out")
    gained = GuidanceAdapter.from_pretrained(tiny_adapter)
    gained.metadata = replace(gained.metadata, guidance_gain=1.5)
    gained.save_pretrained(tmp_path / "gained" / "tiny")
    shutil.copytree(other_adapter, tmp_path / "other" / "tiny")
    for run in (
        evaluation(tiny_adapter, tmp_path / "out", seed=1),
        evaluation(tmp_path / "gained" / "tiny", tmp_path / "out"),
        evaluation(tmp_path / "other" / "tiny", tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="out: holds another evaluation, or one with other options"):
            run.run()
    assert without_times(evaluation(tiny_adapter, tmp_path / "out").run()) == without_times(whole.rows)


def test_the_gain_is_recorded_and_changes_the_results(whole: Evaluation, tmp_path: Path, tiny_adapter: Path) -> None:
    adapter = GuidanceAdapter.from_pretrained(tiny_adapter)
    adapter.metadata = replace(adapter.metadata, guidance_gain=1.5)
    adapter.save_pretrained(tmp_path / "tiny")
    run = evaluation(tmp_path / "tiny", tmp_path / "out")
    assert run.run()[2]["gap_closed"] != whole.rows[2]["gap_closed"]
    assert [info["guidance_gain"] for info in run.metadata["adapters"]] == [1.5]


def test_several_adapters_share_the_baselines(
    whole: Evaluation, tiny_adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    run = evaluation([tiny_adapter, other_adapter], tmp_path, guidance_scale=[2.0], methods=["one_pass"])
    rows = run.run()
    assert [(row["method"], row["adapter"], row["variant"]) for row in rows] == [
        (NONE, None, None),
        (CFG, None, None),
        (ONE_PASS, "tiny", "lora"),
        (ONE_PASS, "other", "offset"),
    ]
    assert [row["fused"] for row in rows] == [None, None, True, False]  # an offset is no change of weights
    assert rows[2]["seed"] is None  # they have no training command
    assert without_times(rows)[2] == without_times(whole.rows)[2]
    assert [info["adapter"] for info in run.metadata["adapters"]] == ["tiny", "other"]
    assert "variant" not in run.metadata


def test_adapters_of_unlike_bases_are_refused(tiny_adapter: Path, other_adapter: Path, tmp_path: Path) -> None:
    unlike = shutil.copytree(other_adapter, tmp_path / "unlike")
    metadata = json.loads((unlike / "adapter_config.json").read_text())
    text = json.dumps(metadata).replace(metadata["base"]["denoiser_fingerprint"], "0" * 64)
    (unlike / "adapter_config.json").write_text(text)
    with pytest.raises(
        UserError, match="unlike was trained with another base than tiny: evaluate each in a run of its own"
    ):
        evaluation([tiny_adapter, unlike], tmp_path / "out").run()


def test_another_number_of_a_method_is_another_evaluation(tiny_adapter: Path, tmp_path: Path) -> None:
    options = {"guidance_scale": [2.0], "num_samples": 2, "reference": None}
    methods = ["one_pass_interval_25_75", "cfg_interval_25_75", "cfg_every_2"]
    run = evaluation(tiny_adapter, tmp_path, methods=methods, **options)
    rows = {row["method"]: row for row in run.run()}
    assert {method: rows[method]["denoiser_evaluations"] for method in methods} == dict(
        zip(methods, (4, 6, 6), strict=True)
    )
    assert [rows[method]["adapter"] for method in methods] == ["tiny", None, None]
    assert rows["one_pass_interval_25_75"]["fused"]
    with pytest.raises(UserError, match="holds another evaluation"):
        evaluation(tiny_adapter, tmp_path, methods=[*methods[:-1], "cfg_every_3"], **options).run()


def test_images_are_saved_on_request(tiny_adapter: Path, tmp_path: Path) -> None:
    evaluation(tiny_adapter, tmp_path, save_images=True, guidance_scale=[2.0], methods=["one_pass"]).run()
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"none-1", "cfg-2", "one_pass-2"}
    names = sorted(path.name for path in (tmp_path / "images" / "one_pass-2").iterdir())
    assert names == [f"{i:05d}.png" for i in range(6)]
    with Image.open(tmp_path / "images" / "cfg-2" / "00005.png") as picture:
        assert picture.size == (32, 32)


def test_latents_that_are_not_finite_are_refused() -> None:
    check_finite(torch.zeros(2, 4), Setting(CFG, 1e30))
    with pytest.raises(UserError, match="guidance_scale=1e\\+30: cfg makes latents that are not finite: name another"):
        check_finite(torch.tensor([0.0, torch.nan]), Setting(CFG, 1e30))


def test_folders_of_near_scales_differ() -> None:
    names = {folder_name(Setting(CFG, scale), several=False) for scale in (2.0, 2.0000001)}
    assert names == {"cfg-2", "cfg-2.0000001"}


def test_a_gap_of_rounding_is_none() -> None:
    assert gap_closed(one_pass_setting(2.0), {2.0: 1e-3}, {2.0: 1e-13}) is None
    assert gap_closed(Setting(CFG, 2.0), {2.0: 0.0}, {2.0: 1e-13}) == 1


def test_what_the_pipeline_cannot_make_is_named_before_any_image_is(tiny_adapter: Path, tmp_path: Path) -> None:
    save_file({"pixels": torch.zeros(4, 30, 30, dtype=torch.uint8)}, tmp_path / "reference.safetensors")
    shutil.copytree("stages/embedded/digits/classifier", tmp_path / "classifier")
    for changes, message in (
        (
            {"scheduler": "FlowMatchEulerDiscreteScheduler"},
            "scheduler=Flow.*: DiTPipeline cannot use it: .*: name another",
        ),
        ({"reference": str(tmp_path)}, "holds images of 1x34x34, and the pipeline makes 1x32x32"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation(tiny_adapter, tmp_path / "out", **changes).run()
    assert not (tmp_path / "out" / "parts").exists()


def test_without_a_reference_the_latents_are_compared_alone(tiny_adapter: Path, tmp_path: Path) -> None:
    rows = evaluation(tiny_adapter, tmp_path, reference=None, guidance_scale=[2.0]).run()
    assert "frechet_distance" not in rows[0]
    assert rows[2]["gap_closed"] < 1


@pytest.fixture(scope="module")
def text_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a briefly trained adapter for a tiny Stable Diffusion."""
    root = tmp_path_factory.mktemp("text")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    teacher = save("stable_diffusion", root / "teacher")
    changes = {"prompts": str(root / "prompts.txt"), "num_trajectories": 12}
    data = generate(generate_config(teacher, root / "data", **changes))
    Trainer(train_config(data, root / "adapter", max_train_steps=2)).run()
    return root / "adapter"


def test_a_text_model_is_judged_by_clip_without_a_reference(text_adapter: Path, tmp_path: Path) -> None:
    changes = {
        "prompts": str(text_adapter.parent / "prompts.txt"),
        "clip_model": str(save_tiny_clip(tmp_path / "clip")),
    }
    rows = evaluation(text_adapter, tmp_path / "out", reference=None, guidance_scale=[3.0], **changes).run()
    assert all(0 <= row["clip_score"] <= 100 and "frechet_distance" not in row for row in rows)
    assert [row["denoiser_evaluations"] for row in rows] == [4, 8, 4, 6, 7]


def test_a_text_model_is_judged_by_the_real_pictures_of_its_prompts(
    text_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, real = text_adapter.parent / "prompts.txt", tmp_path / "real"
    pictures = [encoded(Image.effect_noise((20, 20), 10 * i)) for i in range(len(PROMPTS))]
    write_table(real, pictures, prompt=PROMPTS, category=["x"] * len(PROMPTS))
    module = save_scores(tmp_path, monkeypatch, "scores_of_evaluation")
    changes = {"prompts": str(prompts), "reference": str(real), "features": "efficientnet_lite0"}
    changes |= {"guidance_scale": [3.0], "methods": ["one_pass"], "preference": [f"{module}:length"]}
    run = evaluation(text_adapter, tmp_path / "out", **changes)
    rows = run.run()
    assert all(0 <= row["retrieval_top1"] <= row["retrieval_top5"] <= 1 for row in rows)
    assert all(row["category_accuracy"] == 1 for row in rows)
    asked = [len(PROMPTS[i % len(PROMPTS)]) for i in range(6)]
    assert all(row["preference.length"] == pytest.approx(sum(asked) / 6) for row in rows)
    assert cells_of(rows)[0][-1] == "length"
    assert {"retrieval, top 1", "top 5", "category", "IS"} <= set(cells_of(rows)[0])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPTS[0]}\nanother\n")
    with pytest.raises(UserError, match="prompts: 1 of 2 are in no row of reference=.*real, e.g. 'another'"):
        evaluation(text_adapter, tmp_path / "mixed", **(changes | {"prompts": str(prompts)})).run()
    prompts.write_text("another\n")
    rows = evaluation(text_adapter, tmp_path / "others", **(changes | {"prompts": str(prompts)})).run()
    assert "retrieval_top1" not in rows[0]
    assert rows[0]["frechet_distance"] > 0


def test_all_prompts_have_a_class_or_none(text_adapter: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,class_label\na zero,0\na seven,\n")
    with pytest.raises(UserError, match="1 rows have no class_label: give it to all or to none"):
        evaluation(text_adapter, tmp_path, reference=None, prompts=str(prompts))


def test_prompts_are_checked_before_anything_is_loaded(
    text_adapter: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparisons, "load_pipeline", None)
    for adapter, options, message in (
        (text_adapter, {}, "prompts: not given: StableDiffusionPipeline takes prompts"),
        (text_adapter, {"prompts": "nowhere.csv"}, "prompts=nowhere.csv: not readable"),
        (tiny_adapter, {"prompts": "any.txt"}, r"prompts: DiTPipeline takes classes: say class_labels=\[...\]"),
        (tiny_adapter, {"size": [64]}, r"size=\[64\]: give \[width,height\]"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation(adapter, tmp_path, reference="nowhere", **options)


def test_an_invalid_configuration_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"num_samples": 1}, "at least 2"),
        ({"methods": ["cfg_last_70"]}, "methods=cfg_last_70: some of one_pass, cfg_first_50, cfg_interval_20_80"),
        ({"features": "dino"}, "features=dino: one of classifier, inception"),
        ({"output_dir": None, "adapter_dir": [str(tiny_adapter), "other"]}, "output_dir: not given"),
        ({"output_dir": None, "adapter_dir": "s3://bucket/a"}, "output_dir: not given: s3://bucket/a is in a bucket"),
        ({"output_dir": None, "adapter_dir": "no/adapter"}, "adapter_dir=no/adapter: no such folder: name an adapter"),
        ({"adapter_dir": [str(tiny_adapter)] * 2}, "is given twice"),
        ({"adapter_dir": [str(tiny_adapter), f"{tiny_adapter}/"]}, "is given twice"),
        ({"scheduler": "DDIM"}, "scheduler=DDIM: diffusers .* has no such class"),
        ({"output_dir": str(tiny_adapter)}, "holds an adapter: name a folder of the evaluation's own"),
        ({"adapter_dir": 3}, "adapter_dir=3: name the folder"),
    ):
        config = EvaluateConfig(**({"adapter_dir": str(tiny_adapter), "output_dir": str(tmp_path)} | changes))
        with pytest.raises(UserError, match=message):
            Evaluation(config)
    with pytest.raises(UserError, match="clip_model: DiTPipeline takes classes"):
        evaluation(tiny_adapter, tmp_path, clip_model="somewhere")
    with pytest.raises(UserError, match="preference: DiTPipeline takes classes"):
        evaluation(tiny_adapter, tmp_path, preference=["scores:PickScore"])
