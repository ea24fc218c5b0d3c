from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch._dynamo.utils import counters

import pipeline.train
from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.base.denoiser import fingerprint
from stages.errors import StorageError, UserError
from stages.records.dataset import Dataset
from stages.records.repair import repair
from stages.records.verification import survey
from stages.storage.folder import open_folder
from stages.train import trainer, validation_loss
from stages.train.batch import Batch
from stages.train.config import LOSSES
from stages.train.quantization import LIBRARIES
from stages.train.selection import select
from stages.train.trainer import Trainer
from tests.conftest import VARIANTS, generate, generate_config, small_adapter, train_config
from tests.support.damages import DAMAGES


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_error_and_leaves_the_base_bit_for_bit(
    shared_dataset: Path, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation_loss, "LEAST_EXPLAINED", 0.0)
    config = train_config(
        shared_dataset,
        tmp_path,
        adapter=small_adapter(variant),
        max_train_steps=150,
        learning_rate=3e-3,
    )
    trainer = Trainer(config)
    before = fingerprint(trainer.student.denoiser)
    summary = trainer.run()
    assert fingerprint(trainer.student.denoiser) == before == Dataset(shared_dataset).info.teacher.denoiser_fingerprint
    assert summary["steps"] == 150
    assert summary["validation_loss"] < 0.97 * summary["validation_loss_unguided"]
    gain = (1 - summary["validation_loss"] / summary["validation_loss_unguided"]) ** -0.5
    assert GuidanceAdapter.from_pretrained(tmp_path).metadata.guidance_gain == gain
    assert summary["adapter_parameters"] == sum(p.numel() for p in trainer.adapter.parameters())
    assert summary["records_per_second"] > 0
    assert summary["peak_memory_bytes"] > 0


def test_the_folder_is_that_of_an_adapter(tiny_adapter: Path) -> None:
    assert {path.name for path in tiny_adapter.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    adapter = GuidanceAdapter.from_pretrained(tiny_adapter)
    assert adapter.variant == "lora"
    assert adapter.metadata.scale_range == [1.0, 6.0]
    assert "library_name: diffusers" in (tiny_adapter / "README.md").read_text()


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(
    shared_dataset: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    config = train_config(shared_dataset, tmp_path)
    shutil.copytree(tiny_adapter / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-00000012.pt").unlink()
    trainer = Trainer(replace(config, resume_from_checkpoint="latest"))
    assert trainer.step == 8
    trainer.run()
    one, other = (load_file(root / "adapter_model.safetensors") for root in (tiny_adapter, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_options_that_may_change_on_resuming_do(shared_dataset: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    checkpoint = str(tiny_adapter / "checkpoints" / "step-00000008.pt")
    before = load_file(tiny_adapter / "adapter_model.safetensors")
    for changes in ({"learning_rate": 1e-5}, {"adam_weight_decay": 0.5}, {"lr_scheduler": "constant"}, {"loss": "l2"}):
        output = tmp_path / next(iter(changes))
        after = weights_after(shared_dataset, output, resume_from_checkpoint=checkpoint, **changes)
        assert any(not torch.equal(after[name], before[name]) for name in before), changes


def test_a_finished_run_is_not_mistaken_for_another(shared_dataset: Path, tiny_adapter: Path) -> None:
    for changes in ({"loss": "l2"}, {"learning_rate": 0.5}):
        with pytest.raises(UserError, match="the checkpoint's run had .*, and has finished: raise max_train_steps"):
            Trainer(train_config(shared_dataset, tiny_adapter, resume_from_checkpoint="latest", **changes))
    Trainer(train_config(shared_dataset, tiny_adapter, resume_from_checkpoint="latest", validation_steps=7))


def test_non_finite_weights_stop_the_run_before_they_are_saved(shared_dataset: Path, tmp_path: Path) -> None:
    trainer = Trainer(train_config(shared_dataset, tmp_path))
    step = trainer.optimization.step

    def overflow() -> Tensor:
        norm = step()
        if trainer.step == 7:
            trainer.optimization.parameters[0].data.fill_(torch.nan)
        return norm

    trainer.optimization.step = overflow  # type: ignore[method-assign]
    with pytest.raises(UserError, match="step 8: the weights are no longer finite: lower learning_rate"):
        trainer.run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004.pt"]
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_folder_is_locked_for_one_run_at_a_time(shared_dataset: Path, tmp_path: Path) -> None:
    one, other = (Trainer(train_config(shared_dataset, tmp_path)) for _ in range(2))
    with one.alone(), pytest.raises(UserError, match="another run is training here"), other.alone():
        pass
    with other.alone():
        pass


def test_a_run_cannot_write_into_its_dataset(shared_dataset: Path) -> None:
    with pytest.raises(UserError, match="output_dir=.*: is the dataset's folder"):
        Trainer(train_config(shared_dataset, shared_dataset))


def test_damaged_validation_samples_are_counted_and_all_of_them_are_refused(damaged: Path, tmp_path: Path) -> None:
    options = {"on_damage": "skip", "validation_share": 0.2}
    samples = select(Dataset(damaged), train_config(damaged, tmp_path, **options))[1]
    damage(damaged, samples[0].row)
    summary = Trainer(train_config(damaged, tmp_path / "one", vae_name_or_path=None, **options)).run()
    assert summary["samples_skipped"] == [samples[0].name]
    for sample in samples[1:]:
        damage(damaged, sample.row)
    with pytest.raises(UserError, match="every record to validate with is damaged"):
        Trainer(train_config(damaged, tmp_path / "all", **options)).run()


def test_a_run_stopped_by_damage_resumes_without_it(damaged: Path, tmp_path: Path) -> None:
    config = train_config(damaged, tmp_path, validation_share=0.1, resume_from_checkpoint="latest")
    Trainer(replace(config, max_train_steps=4)).run()
    damage(damaged, select(Dataset(damaged), config)[0][0].row)
    with pytest.raises(UserError, match="training leaves it out with on_damage=skip"):
        Trainer(config).run()
    assert Trainer(replace(config, on_damage="skip")).run()["records_skipped"] == 4


def test_a_checkpoint_of_another_dataset_or_adapter_is_refused(
    shared_dataset: Path, damaged: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    checkpoint = str(tiny_adapter / "checkpoints" / "step-00000008.pt")
    for changes, message in (
        ({"adapter": AdapterConfig("offset", hidden_size=16)}, r"adapter\.[a-z]+=.*: the checkpoint's run had"),
        ({"seed": 1}, "seed=1: the checkpoint's run had 0"),
        ({"max_train_steps": 7}, "max_train_steps=7: the checkpoint is already at step 8"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(train_config(shared_dataset, tmp_path, resume_from_checkpoint=checkpoint, **changes))
    state = torch.load(checkpoint, weights_only=True) | {"dataset_fingerprint": "0" * 64}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not the dataset of the checkpoint: fingerprint .*000000000000"):
        Trainer(train_config(shared_dataset, tmp_path, resume_from_checkpoint=str(tmp_path / "other.pt")))


def test_a_folder_with_an_adapter_is_kept(shared_dataset: Path, tiny_adapter: Path) -> None:
    with pytest.raises(UserError, match="holds an earlier run"):
        Trainer(train_config(shared_dataset, tiny_adapter, seed=5))


def test_a_run_resumed_at_its_end_only_writes_the_folder(
    shared_dataset: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    checkpoint = str(tiny_adapter / "checkpoints" / "step-00000012.pt")
    summary = Trainer(train_config(shared_dataset, tmp_path, resume_from_checkpoint=checkpoint)).run()
    assert summary["steps"] == 12
    assert summary["loss"] > 0
    assert GuidanceAdapter.from_pretrained(tmp_path).variant == "lora"


def test_the_log_has_losses_and_speed(shared_dataset: Path, tmp_path: Path) -> None:
    Trainer(train_config(shared_dataset, tmp_path, report_to="tensorboard", validation_steps=6)).run()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [4, 8, 12]
    assert [point.step for point in events.Scalars("validation_loss")] == [6, 12]
    info = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert info["learning_rate"] >= 0
    assert info["gradient_norm"] > 0
    assert info["records_per_second"] > 0
    assert 0 < info["waiting_share"] < 1
    assert info["peak_memory_bytes"] > 1e6
    assert len([name for name in info if name.startswith("gap_closed/scale_")]) == 2
    for kind in ("loss", "validation_loss"):
        by_scale = {value for name, value in info.items() if name.startswith(f"{kind}_by/scale_")}
        by_timestep = {value for name, value in info.items() if name.startswith(f"{kind}_by/timestep_")}
        for bins in (by_scale, by_timestep):
            assert len(bins) >= 2
            assert min(bins) < info[kind] < max(bins)


def test_a_resumed_run_continues_the_same_log(shared_dataset: Path, tmp_path: Path) -> None:
    config = train_config(shared_dataset, tmp_path, report_to="tensorboard", resume_from_checkpoint="latest")
    Trainer(replace(config, max_train_steps=6, checkpointing_steps=4)).run()
    (tmp_path / "checkpoints" / "step-00000006.pt").unlink()
    Trainer(config).run()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [4, 8, 12]


@pytest.mark.parametrize(
    ("report_to", "message"),
    [("paper", "report_to=paper: one of none, .*tensorboard"), ("wandb", "report_to=wandb: not installed: install it")],
)
def test_a_missing_tracker_is_named(shared_dataset: Path, tmp_path: Path, report_to: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(train_config(shared_dataset, tmp_path, report_to=report_to)).run()


class BrokenTracker:
    """A tracker that fails in one of its methods."""

    name, requires_logging_directory = "paper", False

    def __init__(self, fails_at: str) -> None:
        self.fails_at, self.calls = fails_at, []  # type: ignore[var-annotated]

    def __call__(self, _: str) -> BrokenTracker:
        return self

    def _do(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails_at:
            raise ConnectionError("no route to host\nat all")

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, _: Any) -> None:
        self._do("configuration")

    def log(self, _: Any, step: int) -> None:
        self._do("log")

    def finish(self) -> None:
        self._do("finish")


@pytest.mark.parametrize("fails_at", ["start", "configuration"])
def test_a_tracker_that_cannot_start_is_reported_before_the_first_step(
    shared_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    tracker = BrokenTracker(fails_at)
    monkeypatch.setattr("stages.train.telemetry.tracker_class", lambda _: tracker)
    trainer = Trainer(train_config(shared_dataset, tmp_path))
    with pytest.raises(UserError, match="report_to=none: could not start: ConnectionError: no route to host: fix that"):
        trainer.run()
    assert trainer.step == 0


@pytest.mark.parametrize("fails_at", ["log", "finish"])
def test_a_tracker_that_fails_later_is_dropped_and_the_run_continues(
    shared_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    tracker = BrokenTracker(fails_at)
    monkeypatch.setattr("stages.train.telemetry.tracker_class", lambda _: tracker)
    with pytest.warns(UserWarning, match="failed and is no longer used: ConnectionError: no route to host$"):
        pipeline.train.main(train_config(shared_dataset, tmp_path))
    assert tracker.calls.count(fails_at) == 1
    assert (tmp_path / "training.json").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_base_is_loaded(
    shared_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("stages.train.trainer.load_base", lambda *_: pytest.fail("the base was loaded"))
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match=rf"^{output}: cannot be made: "):
            Trainer(train_config(shared_dataset, output))


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_the_first_step(
    shared_dataset: Path, tmp_path: Path, small_disk: Path
) -> None:
    """On a real disk of one megabyte, if the test may mount one."""
    changes = {"adapter": small_adapter("full"), "checkpointing_steps": 1, "checkpoints_total_limit": 50}
    with pytest.raises(StorageError, match="12 checkpoints of .* MB are needed, and .* MB are free: make room"):
        Trainer(train_config(shared_dataset, small_disk / "run", **changes))
    Trainer(train_config(shared_dataset, tmp_path, **changes))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_keeps_the_adapter_in_fp32(
    shared_dataset: Path, tmp_path: Path, precision: str
) -> None:
    options = {"max_train_steps": 100, "learning_rate": 3e-3, "validation_share": 0.1, "use_ema": True}
    trainer = Trainer(train_config(shared_dataset, tmp_path, mixed_precision=precision, **options))
    assert trainer.student.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    summary = trainer.run()
    assert summary["validation_loss"] < 0.99 * summary["validation_loss_unguided"]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.adapter.parameters())
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "adapter_model.safetensors").values())


def weights_after(data: Path, output: Path, **changes: Any) -> dict[str, Tensor]:
    Trainer(train_config(data, output, **changes)).run()
    return load_file(output / "adapter_model.safetensors")


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3)


def test_two_batches_of_half_the_size_make_the_same_step(shared_dataset: Path, tmp_path: Path) -> None:
    whole = weights_after(shared_dataset, tmp_path / "whole")
    halves = weights_after(shared_dataset, tmp_path / "halves", train_batch_size=4, gradient_accumulation_steps=2)
    assert_close(halves, whole)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "full"])
def test_gradient_checkpointing_changes_nothing_but_memory(shared_dataset: Path, tmp_path: Path, variant: str) -> None:
    options = {"adapter": small_adapter(variant), "learning_rate": 3e-3}
    whole = weights_after(shared_dataset, tmp_path / "whole", **options)
    again = weights_after(shared_dataset, tmp_path / "again", gradient_checkpointing=True, **options)
    assert_close(again, whole)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_training_works_on_a_quantised_base(shared_dataset: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip(LIBRARIES[kind])
    options = {"max_train_steps": 100, "learning_rate": 3e-3, "validation_share": 0.1, "gradient_checkpointing": True}
    config = train_config(shared_dataset, tmp_path, quantization=kind, mixed_precision="bf16", **options)
    summary = Trainer(config).run()
    assert summary["validation_loss"] < 0.99 * summary["validation_loss_unguided"]


def test_compiled_training_gives_the_same_weights(
    shared_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the traced graph, not the compiler's output."""
    torch.compiler.reset()
    eager = weights_after(shared_dataset, tmp_path / "eager")
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    compiled = weights_after(shared_dataset, tmp_path / "compiled", torch_compile=True)
    assert_close(compiled, eager)
    kinds_of_pass, guided_ones = 3, 2  # in training, validated with and without guidance
    assert counters["stats"]["unique_graphs"] == kinds_of_pass + guided_ones  # these compute the inputs of the sites
    torch.compiler.reset()


def test_the_average_is_saved(shared_dataset: Path, tmp_path: Path) -> None:
    config = train_config(shared_dataset, tmp_path, use_ema=True, learning_rate=1e-2)
    trainer = Trainer(config)
    trainer.run()
    saved = GuidanceAdapter.from_pretrained(tmp_path)
    average = trainer.optimization.average
    assert average is not None
    for one, other, last in zip(saved.parameters(), average.shadow_params, trainer.adapter.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, last)


def test_latest_starts_a_new_run_without_a_checkpoint(shared_dataset: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    weights = weights_after(shared_dataset, tmp_path, resume_from_checkpoint="latest")
    expected = load_file(tiny_adapter / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def damage(root: Path, row: dict[str, Any]) -> None:
    content = bytearray((root / row["shard"]).read_bytes())
    content[row["offset"] + 400] ^= 4
    (root / row["shard"]).write_bytes(content)


def test_damage_stops_a_run_or_is_skipped_and_counted(damaged: Path, tmp_path: Path) -> None:
    rows = Dataset(damaged).manifest.to_pylist()
    damage(damaged, rows[4])
    (damaged / rows[-1]["shard"]).unlink()
    with pytest.raises(UserError, match=r"no such file.*training leaves it out with on_damage=skip"):
        Trainer(train_config(damaged, tmp_path / "stopped"))
    summary = Trainer(train_config(damaged, tmp_path / "skipped", on_damage="skip", validation_share=0.1)).run()
    lost = {f"{row['shard']} {row['key']}" for row in rows if row["shard"] == rows[-1]["shard"] or row is rows[4]}
    assert set(summary["samples_skipped"]) <= lost
    assert summary["records_skipped"] == 4 * len(summary["samples_skipped"]) >= 4 * (len(lost) - 1)


def test_a_mismatch_is_refused_before_the_base_is_loaded(
    shared_dataset: Path, tiny_teacher: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("stages.train.base.load_denoiser", loaded)
    bases = {}
    for name, changes in {"channels": {"in_channels": 16}, "class": {"_class_name": "UNet2DConditionModel"}}.items():
        bases[name] = Path(shutil.copytree(tiny_teacher, tmp_path / name))
        path = bases[name] / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    info = Dataset(shared_dataset).info
    newer = Path(shutil.copytree(shared_dataset, tmp_path / "newer"))
    (newer / "dataset.json").write_text(json.dumps(info.to_json() | {"schema_version": 99}))
    checkpoint = str(tiny_adapter / "checkpoints" / "step-00000008.pt")
    refused: list[tuple[Path, dict[str, Any], str]] = [
        (shared_dataset, {"pretrained_model_name_or_path": str(bases["channels"])}, r"takes latents of 16 channels, and .* was made with 4"),
        (shared_dataset, {"pretrained_model_name_or_path": str(bases["class"])}, "a UNet2DConditionModel, and .* made with a DiTTransformer2D"),
        (newer, {}, "schema 99 is newer"),
        (shared_dataset, {"resume_from_checkpoint": checkpoint, "seed": 1}, "seed=1: the checkpoint's run had 0"),
    ]  # fmt: skip
    for data, changes, message in refused:
        with pytest.raises(UserError, match=message):
            Trainer(train_config(data, tmp_path / "run", **changes))


def test_held_out_predictions_are_shown_through_a_vae(shared_dataset: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    options = {"vae_name_or_path": str(tiny_teacher), "validation_steps": 6, "report_to": "tensorboard"}
    Trainer(train_config(shared_dataset, tmp_path, **options)).run()
    assert sorted(path.name for path in (tmp_path / "held_out").iterdir()) == ["step-00000006.png", "step-00000012.png"]
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [
        image.step for image in events.Images("held_out/0" if "held_out/0" in events.Tags()["images"] else "held_out")
    ] == [6, 12]


@pytest.fixture(scope="module")
def scales_with_1(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in which half of the trajectories are without guidance."""
    scales = {"guidance_scale": [1.0, 3.0], "guidance_scale_distribution": "list"}
    return generate(generate_config(tiny_teacher, tmp_path_factory.mktemp("data") / "with_1", **scales))


SETTINGS = {
    "one record": {"train_batch_size": 1},
    "several batches": {"train_batch_size": 1, "gradient_accumulation_steps": 2},
    "bf16": {"train_batch_size": 1, "mixed_precision": "bf16", "use_ema": True},
    "fp16": {"train_batch_size": 1, "mixed_precision": "fp16"},
    "checkpointed": {"train_batch_size": 1, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_without_guidance_train_like_others(
    scales_with_1: Path, tmp_path: Path, variant: str, setting: str
) -> None:
    if variant == "full" and setting == "checkpointed":
        pytest.skip("full cannot be")
    changes = {"adapter": small_adapter(variant), "loss": "l2"} | SETTINGS[setting]
    trainer = Trainer(train_config(scales_with_1, tmp_path, **changes))
    batches = iter(trainer.stream)
    kinds = set()
    for step in range(12):
        trainer.train_step(batches)
        guided = max(float(losses.max()) for _, losses in trainer.meter.batches) > 1e-3  # rounding leaves less
        assert (float(trainer.meter.norms[-1]) > 0) == guided
        kinds.add(guided)
        trainer.meter._clear()
        assert trainer.step == step + 1
    assert kinds == {True, False}
    assert trainer.optimization.is_finite()


def test_what_cannot_be_sampled_is_left_out_in_a_line(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = generate(generate_config(tiny_teacher, tmp_path / "data", num_recorded_steps=2))
    pipeline.train.main(train_config(data, tmp_path / "run", vae_name_or_path=str(tiny_teacher)))
    lines = capsys.readouterr().out.splitlines()
    assert "validation: no gap closed and no pictures: num_recorded_steps=2 leaves steps out" in lines
    assert json.loads((tmp_path / "run" / "training.json").read_text())["gap_closed"] == {}


def test_without_options_a_run_chooses_rate_and_length(
    shared_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.train.defaults.LEAST_STEPS", 10)
    options = {"max_train_steps": None, "validation_steps": None, "train_batch_size": 4}
    pipeline.train.main(train_config(shared_dataset, tmp_path, **options))
    chosen = "40 steps of 4 records, 4.0 passes over 40; learning rate 0.005 after 4 steps of warm-up; validation every 10 steps"
    assert chosen in capsys.readouterr().out.splitlines()
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 40
    pipeline.train.main(train_config(shared_dataset, tmp_path, **options))
    assert "already trained with this configuration" in capsys.readouterr().out


def test_a_dataset_without_any_guidance_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    data = generate(generate_config(tiny_teacher, tmp_path / "data", guidance_scale=[1.0, 1.0]))
    with pytest.raises(UserError, match="every record to train on has scale 1, which is no guidance: generate with"):
        Trainer(train_config(data, tmp_path / "run"))


def test_compiled_training_takes_batches_without_guidance(scales_with_1: Path, tmp_path: Path) -> None:
    torch.compiler.reset()
    trainer = Trainer(train_config(scales_with_1, tmp_path, train_batch_size=1))
    trainer.student.call = torch.compile(trainer.student.denoiser, backend="eager")
    by_scale = {float(batch.scale[0]): batch for batch in islice(trainer.stream, 20)}
    for scale in (1.0, 3.0, 1.0):
        trainer.train_step(iter([by_scale[scale]]))
    assert trainer.step == 3
    assert [float(norm) > 0 for norm in trainer.meter.norms] == [False, True, False]
    torch.compiler.reset()


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "l1"])
def test_every_loss_trains(shared_dataset: Path, tmp_path: Path, loss: str) -> None:
    config = train_config(shared_dataset, tmp_path, loss=loss, max_train_steps=100, learning_rate=3e-3)
    summary = Trainer(config).run()
    assert summary["validation_loss"] < summary["validation_loss_unguided"]


def test_a_non_finite_loss_stops_the_run_and_names_its_records(shared_dataset: Path, tmp_path: Path) -> None:
    trainer = Trainer(train_config(shared_dataset, tmp_path, logging_steps=3, checkpointing_steps=3))
    objective, batches = trainer.objective, []

    def spoiled(prediction: Tensor, batch: Batch) -> Tensor:
        batches.append(batch)
        losses = objective(prediction, batch)
        return losses * torch.where(torch.arange(len(losses)) == 5, torch.nan, 1) if len(batches) == 5 else losses

    trainer.objective = spoiled  # type: ignore[assignment]
    with pytest.raises(
        UserError, match=r"step 5: the loss is not finite at shards/.*\.tar 0000000\d\d_0000 record"
    ) as raised:
        trainer.run()
    scale, timestep = (float(getattr(batches[4], name)[5]) for name in ("scale", "timestep"))
    assert f"scale {scale:g}, timestep {timestep:g}: lower learning_rate" in str(raised.value)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003.pt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size=0"),
        ({"validation_share": 1.0}, "validation_share=1.0"),
        ({"mixed_precision": "fp8"}, "mixed_precision=fp8"),
        ({"lr_scheduler": "magic"}, "lr_scheduler=magic"),
        ({"loss": "l3"}, "loss=l3: one of rms, l2, l1, noise_weighted, guidance"),
        ({"validation_share": 0.99}, "no record is left"),
        ({"seed": -1}, "seed=-1: at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: more than 0"),
        ({"adapter": AdapterConfig(rank=0)}, "adapter.rank=0: at least 1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0: more than 0"),
        (
            {"quantization": "int8"},
            "quantization=int8: .* every layer's full weight.*: add gradient_checkpointing=true",
        ),
        (
            {"quantization": "int8", "adapter": AdapterConfig("full")},
            "quantization=int8: the variant `full` trains the base's",
        ),
        ({"quantization": "fp4"}, "quantization=fp4: one of none, int8, fp8, int4, nf4"),
        (
            {"quantization": "int4", "gradient_checkpointing": True},
            "quantization=int4: (torchao is not installed|needs a GPU)",
        ),
        ({"enable_group_offload": True}, "enable_group_offload=true: .*: add gradient_checkpointing=true"),
        (
            {"enable_group_offload": True, "quantization": "nf4", "gradient_checkpointing": True},
            "enable_group_offload=true: a base in nf4 stays on the GPU",
        ),
        (
            {"enable_group_offload": True, "torch_compile": True, "gradient_checkpointing": True},
            "enable_group_offload=true: .* leave torch_compile out",
        ),
        (
            {"enable_group_offload": True, "adapter": AdapterConfig("full")},
            "enable_group_offload=true: the variant `full`",
        ),
        (
            {"gradient_checkpointing": True, "adapter": AdapterConfig("full")},
            "gradient_checkpointing=true: the variant `full` swaps",
        ),
    ],
)
def test_invalid_options_are_refused(shared_dataset: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(train_config(shared_dataset, tmp_path, **changes))


def test_the_summary_is_json(shared_dataset: Path, tmp_path: Path) -> None:
    summary = Trainer(train_config(shared_dataset, tmp_path)).run()
    assert json.loads(json.dumps(summary)) == summary


def grow(root: Path, teacher: Path, **changes: Any) -> None:
    """Generate into an existing dataset, with some options changed."""
    generate(generate_config(teacher, root, **changes))


def test_a_resumed_run_keeps_the_snapshot_that_it_started_with(
    damaged: Path, tiny_teacher: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = Dataset(damaged).fingerprint
    shutil.copytree(tiny_adapter / "checkpoints", tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "step-00000012.pt").unlink()
    grow(damaged, tiny_teacher, num_trajectories=20)
    pipeline.train.main(train_config(damaged, tmp_path / "run", resume_from_checkpoint="latest"))
    message = f"{damaged}: has grown; the run continues with the 12 trajectories that it started with"
    told = capsys.readouterr().out
    assert told.count(message) == 1
    assert f"{tmp_path / 'run'}: continues after step 8 of 12" in told.splitlines()
    one, other = (load_file(root / "adapter_model.safetensors") for root in (tiny_adapter, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert GuidanceAdapter.from_pretrained(tmp_path / "run").metadata.dataset_fingerprint == begun
    fresh = Trainer(train_config(damaged, tmp_path / "fresh"))
    assert fresh.dataset.newest
    assert fresh.stream.records_per_epoch == 4 * 16


def test_a_finished_run_stays_finished_when_its_dataset_grows_and_not_when_it_is_another(
    damaged: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config(damaged, tmp_path / "run", max_train_steps=2)
    pipeline.train.main(config)
    grow(damaged, tiny_teacher, num_trajectories=20)
    pipeline.train.main(config)
    assert capsys.readouterr().out.endswith("already trained with this configuration; nothing to do\n")
    shutil.rmtree(damaged)
    grow(damaged, tiny_teacher, seed=1)
    with pytest.raises(
        UserError, match=f"run: holds an adapter of another dataset than that in data_dir={damaged}: take"
    ):
        pipeline.train.main(config)


def test_the_first_process_chooses_the_snapshot(
    damaged: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process opened the dataset before it grew."""
    first = Dataset(damaged).fingerprint
    grow(damaged, tiny_teacher, num_trajectories=20)
    monkeypatch.setattr(trainer, "snapshots", lambda root: [first])
    assert Trainer(train_config(damaged, tmp_path)).dataset.fingerprint == first


def test_a_run_is_resumed_exactly_after_a_repair(
    damaged: Path, tiny_teacher: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_adapter / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-00000012.pt").unlink()
    names = set(Dataset(damaged).manifest["shard"].to_pylist())
    DAMAGES["two shards swapped"](damaged)
    repair(survey(open_folder(damaged), deep=True), grace=0)
    grow(damaged, tiny_teacher)
    assert len(names & set(Dataset(damaged).manifest["shard"].to_pylist())) == 2
    Trainer(train_config(damaged, tmp_path, resume_from_checkpoint="latest")).run()
    one, other = (load_file(root / "adapter_model.safetensors") for root in (tiny_adapter, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_on_fewer_classes_is_resumed_after_more_were_added(tiny_teacher: Path, tmp_path: Path) -> None:
    """The adapter's class table keeps its length."""
    data, run = tmp_path / "data", tmp_path / "run"
    grow(data, tiny_teacher, class_labels=[0, 1, 2])
    config = train_config(data, run, resume_from_checkpoint="latest", lr_scheduler="constant")
    Trainer(replace(config, max_train_steps=4)).run()
    whole = weights_after(data, tmp_path / "whole", lr_scheduler="constant")
    grow(data, tiny_teacher, class_labels=[0, 1, 2, 9], num_trajectories=18)
    Trainer(config).run()
    resumed = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
