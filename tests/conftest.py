"""Session fixtures: tiny pipelines with random weights, one Ray, one small dataset, one small adapter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from stages.adapters import AdapterConfig
from stages.generate import teacher
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.driver import Driver
from stages.generate.in_process import InProcessFleet
from stages.records.dataset import Dataset
from stages.train.config import TrainConfig
from stages.train.trainer import Trainer
from tests.support.faulty_s3 import FaultyS3
from tests.support.hub import Hub, running_hub

torch.set_num_threads(1)  # with matrices this small a second thread only waits
VARIANTS = [
    "offset",
    "cross_attention",
    "gated_mlp",
    "lora",
    "embedding",
    "full",
]


def mostly_long(values: Sequence[str], kept: Sequence[str]) -> list[Any]:
    """Mark all but a few of these parameters as long: `make test` runs the few, `make test-all` runs all."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.long) for value in values]


def small_adapter(variant: str = "lora", **changes: Any) -> AdapterConfig:
    """Return a configuration of a few thousand parameters, at all the sites that a variant can have."""
    sites = None if variant == "embedding" else ["attention", "feed_forward"]
    return AdapterConfig(variant, **{"sites": sites, "hidden_size": 16, "rank": 4} | changes)


def tiny_dit(out_channels: int = 4) -> DiTPipeline:
    """Make a DiT of two blocks on latents `[4, 8, 8]` with ten classes; with 8 output channels it learns a variance.

    Stock initialisation makes a DiT that nearly ignores its class; here the conditions matter.
    """
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=out_channels,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight)
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.3)
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(pipe: DiTPipeline, folder: Path) -> Path:
    """Save a DiT with the names of its classes, like those on a model hub."""
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): str(i) for i in range(10)}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def generate_config(teacher: Path, output: Path | str, **changes: Any) -> GenerateConfig:
    """Return a configuration of twelve trajectories of four steps in four units."""
    defaults = {
        "num_trajectories": 12,
        "num_inference_steps": 4,
        "trajectories_per_unit": 3,
        "guidance_scale": [1.0, 6.0],
        "device": "cpu",
    }
    return GenerateConfig(teacher=TeacherConfig(str(teacher)), output_dir=str(output), **(defaults | changes))


def generate(config: GenerateConfig) -> Path:
    """Make a whole dataset in this process."""
    Driver(config).run(InProcessFleet(config))
    return Path(config.output_dir)


def train_config(data: Path | str, output: Path, **changes: Any) -> TrainConfig:
    defaults = {
        "adapter": small_adapter(),
        "train_batch_size": 8,
        "max_train_steps": 12,
        "validation_share": 0.2,
        "checkpointing_steps": 4,
        "validation_steps": 1000,
        "logging_steps": 4,
        "report_to": "none",
        "device": "cpu",
    }
    return TrainConfig(data_dir=str(data), output_dir=str(output), **(defaults | changes))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline with `tiny_dit()`."""
    return save_pipeline(tiny_dit(), tmp_path_factory.mktemp("teacher") / "tiny_dit")


@pytest.fixture(scope="session")
def layouts() -> dict[str, Any]:
    return {}


@pytest.fixture
def layout_found_once(layouts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Find a teacher's layout once for all the tests that load this teacher and test something else."""
    find = teacher.find_layout

    def find_once(pipe: Any, request: Any, expected_steps: int | None = None) -> Any:
        place = (pipe.name_or_path, request.conditions[0], request.num_inference_steps, request.arguments)
        key = repr((place, expected_steps))
        if key not in layouts:
            layouts[key] = find(pipe, request, expected_steps)
        return layouts[key]

    monkeypatch.setattr(teacher, "find_layout", find_once)


@pytest.fixture(scope="session")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    pipe = tiny_dit()
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias.add_(0.5)
    return save_pipeline(pipe, tmp_path_factory.mktemp("teacher") / "other_dit")


@pytest.fixture(scope="session")
def shared_dataset(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset of `tiny_teacher`, read-only by convention."""
    return generate(generate_config(tiny_teacher, tmp_path_factory.mktemp("data") / "tiny"))


@pytest.fixture
def dataset(shared_dataset: Path) -> Dataset:
    return Dataset(shared_dataset)


@pytest.fixture
def damaged(shared_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset for a test to damage."""
    return Path(shutil.copytree(shared_dataset, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def tiny_adapter(shared_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a briefly trained adapter, read-only by convention."""
    config = train_config(shared_dataset, tmp_path_factory.mktemp("runs") / "tiny")
    Trainer(config).run()
    return Path(config.output_dir)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[FaultyS3]:
    """One real S3 server for all tests that need it."""
    server = FaultyS3()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """The server with an empty bucket named `bucket`; the environment variables point to it."""
    with s3_server.empty_bucket(monkeypatch) as server:
        yield server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub; the client has no token for it."""
    with running_hub() as server:
        server.point_to(monkeypatch)
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte, mounted if the tests run as root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system; test_driver.py limits the file size instead")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, room: int) -> Path:
    """Write a file on a small disk, until only this much space is left."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - room))
    return ballast


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One real Ray for all tests that need it; its GPU is fictitious, so that GPU requests can be checked."""
    import ray

    from stages.generate import fleet  # noqa: F401  sets what ray reads at import

    ray.init(
        address="local", num_cpus=4, num_gpus=1, resources={"teachers": 1}, include_dashboard=False, log_to_driver=False
    )
    yield
    ray.shutdown()
