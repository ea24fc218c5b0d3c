"""Several sizes in one dataset, through both stages, for families whose denoisers are told the size in different ways."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.adapters import GuidanceAdapter
from stages.adapters.folder import WEIGHTS_FILE
from stages.base.denoiser import denoiser_of, unflatten
from stages.base.hooks import Call, watch_steps
from stages.base.loading import load_pipeline
from stages.base.sampling import Request, sample, undecoded
from stages.base.size import SIZE_KEYS, size_name
from stages.errors import UserError
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Evaluation
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.timesteps import shifted_timesteps
from stages.records.dataset import Dataset
from stages.records.verification import verify
from stages.train.base import load_base
from stages.train.batch import Batch
from stages.train.sampling import HeldOutSampling
from stages.train.selection import SelectedSample
from stages.train.stream import RecordStream
from stages.train.student import Student
from stages.train.trainer import Trainer
from stages.train.window import load
from tests.conftest import generate, generate_config, mostly_long, small_adapter, train_config
from tests.support.families import PROMPTS, save

SIZES = [[32, 32], [48, 32], [32, 48]]  # the last two have as many pixels
CALLS: dict[str, dict[str, Any]] = {
    "stable_diffusion": {},
    "stable_diffusion_xl": {},
    "stable_diffusion_3": {"max_sequence_length": 32},
    "qwen_image": {},
    "chroma": {"max_sequence_length": 32},
    "wan": {"max_sequence_length": 32},
}
FAMILIES = mostly_long(list(CALLS), ["qwen_image", "stable_diffusion_3"])


def sized_config(family: str, folder: Path, **changes: Any) -> GenerateConfig:
    """Return a configuration of two trajectories of each prompt and size, in a unit for each size."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    config = generate_config(
        save(family, folder / "teacher"),
        folder / "data",
        **{"prompts": str(folder / "prompts.txt"), "trajectories_per_unit": 4, "storage_dtype": "float32"} | changes,
    )
    sizes = [[*size, 1] for size in SIZES] if family == "wan" else SIZES
    config.teacher = TeacherConfig(config.teacher.pretrained_model_name_or_path, call=CALLS[family], sizes=sizes)
    return config


@pytest.fixture(scope="module", params=FAMILIES)
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(generate(sized_config(request.param, tmp_path_factory.mktemp(request.param))))


def test_each_unit_has_one_size_and_each_prompt_all(dataset: Dataset) -> None:
    rows = dataset.manifest.to_pylist()
    assert Counter((row["prompt"], row["width"], row["height"]) for row in rows) == {
        (prompt, width, height): 2 for prompt in PROMPTS for width, height in SIZES
    }
    for shard in {row["shard"] for row in rows}:
        assert len({size_name(row) for row in rows if row["shard"] == shard}) == 1
    found = verify(dataset.root)
    assert found["ok"]
    assert found["histograms"]["size"] == dict.fromkeys(sorted({size_name(row) for row in rows}), 4)


def test_held_out_trajectories_of_every_size_are_sampled(dataset: Dataset) -> None:
    samples = [SelectedSample(row) for row in dataset.manifest.to_pylist()]
    sampling = HeldOutSampling(dataset, samples, (1.0, 6.0), "cpu")
    found = sampling.measure(Student.create(dataset, small_adapter(), load_base(dataset)))
    assert len({held_out.window.size for held_out in sampling.held_out}) > 1
    for held_out, unguided, one_pass in zip(sampling.held_out, found.unguided, found.one_pass, strict=True):
        assert one_pass.shape == held_out.noise.shape[1:]
        torch.testing.assert_close(one_pass, unguided, atol=1e-3, rtol=1e-3)


def test_the_denoiser_of_the_student_gets_what_the_pipeline_gives_it(dataset: Dataset) -> None:
    """Without guidance, the student predicts at each size what the untouched pipeline does from the same noise."""
    teacher = dataset.info.teacher
    pipe: Any = load_pipeline(teacher.pretrained_model_name_or_path)
    student = Student.create(dataset, small_adapter(), load_base(dataset))
    rows = {row["shard"]: row for row in reversed(dataset.manifest.to_pylist())}
    assert len(rows) == len(SIZES)
    for number, row in enumerate(sorted(rows.values(), key=lambda row: row["shard"])):
        batch = load(dataset, [SelectedSample(row)]).take(torch.tensor([0])).to("cpu", torch.float32)
        seen: list[Call] = []
        condition = {key: row[key] for key in ("prompt", *SIZE_KEYS)}
        shifted = shifted_timesteps(pipe.scheduler, ((number + 0.5) * 0.6180339887498949) % 1)
        with shifted, undecoded(pipe), watch_steps(pipe, lambda calls, *_, into=seen: into.append(calls[0])):
            sample(pipe, Request([condition], [row["seed"]], 4, teacher.arguments), 1.0)
        with torch.no_grad():
            unguided = denoiser_of(pipe)[1](**unflatten(seen[0].inputs), return_dict=False)[0]
            predicted = student.predict(batch, guided=False)
        torch.testing.assert_close(predicted, unguided[:, : predicted.shape[1]], atol=1e-4, rtol=1e-4)


def test_training_mixes_the_sizes_batch_by_batch(dataset: Dataset, tmp_path: Path) -> None:
    config = train_config(dataset.root, tmp_path / "run", max_train_steps=6, train_batch_size=4)
    trainer = Trainer(config)
    assert {batch.size for batch in islice(trainer.stream, 6)} == set(dataset.info.sizes)
    trainer.stream.go_to(0)
    summary = trainer.run()
    adapter = GuidanceAdapter.from_pretrained(tmp_path / "run")
    assert adapter.metadata.training["sizes"].keys() == dataset.info.sizes.keys()
    assert all(f"{size}, latents [" in (tmp_path / "run" / "README.md").read_text() for size in dataset.info.sizes)
    assert {name for name in summary["validation_loss_by"] if name.startswith("size_")} <= {
        f"size_{size}" for size in dataset.info.sizes
    }


def identity(batch: Batch) -> list[tuple[str, float, float]]:
    """Size, scale and timestep identify a record."""
    pairs = zip(batch.scale.tolist(), batch.timestep.tolist(), strict=True)
    return [(batch.size, scale, float(timestep)) for scale, timestep in pairs]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """13 trajectories of 4 records: 24 of a size that one prompt asks for, and 28 of three sizes in turn."""
    folder = tmp_path_factory.mktemp("uneven")
    config = sized_config("stable_diffusion", folder, num_trajectories=13, trajectories_per_unit=3)
    (folder / "prompts.csv").write_text("prompt,width,height\none,,\nanother,40,32\n")
    config.prompts = str(folder / "prompts.csv")
    return Dataset(generate(config))


def stream(dataset: Dataset, shuffle_bytes: int, **options: Any) -> RecordStream:
    samples = [*map(SelectedSample, dataset.manifest.to_pylist())]
    return RecordStream(dataset, samples, **{"batch_size": 6, "seed": 0, "shuffle_bytes": shuffle_bytes} | options)


@pytest.mark.parametrize("shuffle_bytes", [30_000, 1 << 30])
def test_every_record_comes_once_per_epoch_in_batches_of_one_size(uneven: Dataset, shuffle_bytes: int) -> None:
    assert Counter(size_name(row) for row in uneven.manifest.to_pylist()) == {
        "40x32": 6, "32x32": 3, "48x32": 2, "32x48": 2
    }  # fmt: skip
    running = stream(uneven, shuffle_bytes)
    counts: Counter[Any] = Counter()
    for batch in islice(running, 80):
        assert len(batch) == 6
        counts.update(identity(batch))
        epochs = running.consumed // 52
        assert len(running.pending) == running.consumed - counts.total()
        assert len(running.pending) < 4 * 6
        assert set(counts.values()) <= {epochs - 1, epochs, epochs + 1}
        assert [name.split("scale ")[1] for name in running.locate_records(running.drawn)] == [
            f"{scale:g}, timestep {timestep:g}" for _, scale, timestep in identity(batch)
        ]
    assert len(counts) == 52


@pytest.mark.parametrize("shuffle_bytes", [30_000, 1 << 30])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7, 9, 30])
def test_a_resumed_stream_continues_exactly(uneven: Dataset, stop: int, shuffle_bytes: int) -> None:
    whole = [identity(batch) for batch in islice(stream(uneven, shuffle_bytes), 50)]
    begun = stream(uneven, shuffle_bytes)
    for _ in islice(begun, stop):
        pass
    resumed = stream(uneven, shuffle_bytes)
    resumed.go_to(begun.consumed, begun.pending)
    assert [identity(batch) for batch in islice(resumed, 50 - stop)] == whole[stop:]
    assert [identity(batch) for batch in islice(begun, 50 - stop)] == whole[stop:]
    two = [stream(uneven, shuffle_bytes, batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    for one in two:
        one.go_to(*((begun.consumed, begun.pending) if stop == 0 else (0, [])))
    for batches, expected in zip(islice(zip(*two, strict=True), 10), whole, strict=False):
        if stop != 0:
            assert [identity(batch) for batch in batches] == [expected[::2], expected[1::2]]
        assert [one.pending for one in two] == [two[0].pending] * 2


def test_a_resumed_run_ends_with_the_same_weights(uneven: Dataset, tmp_path: Path) -> None:
    options = {"train_batch_size": 6, "max_train_steps": 12, "checkpointing_steps": 4, "shuffle_bytes": 30_000}
    Trainer(train_config(uneven.root, tmp_path / "whole", **options)).run()
    begun = Trainer(train_config(uneven.root, tmp_path / "begun", **options | {"checkpointing_steps": 7}))
    begun.run()
    last = tmp_path / "begun" / "checkpoints" / "step-00000007.pt"
    options |= {"resume_from_checkpoint": str(last)}
    resumed = Trainer(train_config(uneven.root, tmp_path / "begun", **options))
    assert resumed.step == 7
    assert resumed.stream.pending
    resumed.run()
    weights = [(tmp_path / name / WEIGHTS_FILE).read_bytes() for name in ("whole", "begun")]
    assert weights[0] == weights[1]


def test_a_grown_dataset_keeps_its_sizes(tmp_path: Path) -> None:
    config = sized_config("stable_diffusion", tmp_path, num_trajectories=5, trajectories_per_unit=2)
    before = Dataset(generate(config)).manifest.to_pylist()
    Path(str(config.prompts)).write_text("\n".join([*PROMPTS, "a third"]))
    grown = Dataset(generate(replace(config, num_trajectories=14)))
    assert grown.manifest.to_pylist()[: len(before)] == before
    assert Counter(size_name(row) for row in grown.manifest.to_pylist()) == {"32x32": 4, "48x32": 5, "32x48": 5}
    assert verify(grown.root)["ok"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([[32]], r"teacher.sizes: \[32\]: give \[width,height\] in pixels, or \[width,height,frames\] of a video"),
        ([32], r"teacher.sizes: 32: give \[width,height\]"),
        ([["32", 32]], r"give \[width,height\]"),
        ([[True, 32]], r"give \[width,height\]"),
        ([[32.0, 32]], r"give \[width,height\]"),
        ([[32, 4]], "32x4 is too small: at least 8x8 pixels"),
        ([[32, 32], [32, 32]], "32x32 stands there twice"),
        ([[32, 32, 5]], "size 32x32x5: StableDiffusionPipeline takes no num_frames: leave the size out"),
        ([[32, 32], [32, 33]], "does not run at size 32x33, .* have to be divisible by 8 .* name another size"),
    ],
)
def test_what_is_no_size_of_the_teacher_is_refused(tmp_path: Path, sizes: list[Any], message: str) -> None:
    config = sized_config("stable_diffusion", tmp_path)
    config.teacher.sizes = sizes
    with pytest.raises(UserError, match=message):
        generate(config)
    assert not (tmp_path / "data" / "shards").exists()


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("chroma", [[32, 32], [36, 32]], "size 36x32: ChromaPipeline makes 32x32 in its place"),
        ("chroma", [[36, 32]], "size 36x32: ChromaPipeline makes 32x32 in its place"),
        ("chroma", [[40, 36], [36, 40]], "size 40x36: ChromaPipeline makes 40x32 in its place"),
        ("wan", [[32, 32, 5], [32, 32, 6]], "size 32x32x6: WanPipeline makes 32x32x7 in its place"),
        ("wan", [[32, 32, 0]], "32x32x0 is too small: .* one frame of a video"),
    ],
)
def test_a_size_that_the_pipeline_rounds_is_refused(
    tmp_path: Path, family: str, sizes: list[Any], message: str
) -> None:
    config = sized_config(family, tmp_path)
    config.teacher.sizes = sizes
    with pytest.raises(UserError, match=message):
        generate(config)
    assert not (tmp_path / "data" / "shards").exists()


def test_a_number_of_frames_that_the_vae_divides_is_made(tmp_path: Path) -> None:
    config = sized_config("wan", tmp_path, num_trajectories=1)
    config.teacher.sizes = [[32, 32, 5]]
    dataset = Dataset(generate(config))
    assert dataset.info.sizes["32x32x5"].tensors["latent"].shape[1] == 3


def test_sizes_that_two_options_name_are_refused(tmp_path: Path) -> None:
    config = sized_config("stable_diffusion", tmp_path)
    config.teacher.height = 32
    with pytest.raises(UserError, match=r"teacher.height=32: teacher.sizes decides it"):
        generate(config)
    config.teacher.height, config.teacher.call = None, {"width": 32}
    with pytest.raises(UserError, match=r"teacher.call.width: decided by the sizes of the trajectories"):
        generate(config)
    for content, message in (
        ("prompt,width\none,32\n", "row 1: width without height: give width and height"),
        ("prompt,height,width\none,32,4\n", "row 1: 4x32 is too small"),
        ("prompt,width,height\none,32,32.5\n", "row 1: height='32.5': not a whole number"),
        ("prompt,Width,Height\none,32,32\n", "'Width' would be ignored: write width"),
    ):
        config.teacher.call = {}
        (tmp_path / "prompts.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            generate(replace(config, prompts=str(tmp_path / "prompts.csv")))


def test_a_teacher_of_one_size_takes_no_other(tiny_teacher: Path, tmp_path: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    config.teacher.height = 32
    with pytest.raises(UserError, match="teacher.height=32: DiTPipeline takes no height: leave it out"):
        generate(config)
    config.teacher.height = None
    config.teacher.sizes = [[32, 32]]
    with pytest.raises(UserError, match="size 32x32: DiTPipeline takes no width: leave the size out"):
        generate(config)


def test_an_evaluation_has_the_size_that_it_is_asked_for(uneven: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(train_config(uneven.root, run, max_train_steps=2)).run()
    (tmp_path / "prompts.csv").write_text("prompt,width,height\none,32,48\nanother,48,32\n")
    config = EvaluateConfig(
        str(run), prompts=str(tmp_path / "prompts.csv"), reference=None, num_samples=2, num_inference_steps=2,
        guidance_scale=[2.0], methods=["one_pass"], device="cpu", size=[40, 32],
    )  # fmt: skip
    evaluation = Evaluation(config)
    evaluation.run()
    assert {images.shape[-2:] for images in evaluation.shown.values()} == {(32, 40)}
    assert evaluation.metadata["size"] == [40, 32]
    for size, message in (
        (None, r"prompts: of several sizes \(32x48, 48x32\): say size=\[WIDTH,HEIGHT\]"),
        ([32], r"size=\[32\]: give \[width,height\]"),
        ([32, 33], r"size=\[32, 33\]: StableDiffusionPipeline does not make it: .*divisible by 8"),
    ):
        with pytest.raises(UserError, match=message):
            Evaluation(replace(config, size=size, output_dir=str(tmp_path / "other"))).run()
