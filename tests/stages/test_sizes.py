"""Several sizes in one dataset, through both stages, for families whose denoisers are told the size in different ways."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.base.denoiser import denoiser_of, unflatten
from stages.base.hooks import Call, watch_steps
from stages.base.loading import load_pipeline
from stages.base.sampling import Request, sample, undecoded
from stages.base.size import SIZE_KEYS, size_name
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.timesteps import shifted_timesteps
from stages.records.dataset import Dataset
from stages.records.verification import verify
from stages.train.batch import Batch
from stages.train.selection import SelectedSample
from stages.train.stream import RecordStream
from stages.train.student import Student, load_base
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
