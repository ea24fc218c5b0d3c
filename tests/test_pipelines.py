"""The zoo from end to end: recorded, trained on, sampled in one pass; or refused in one line before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.adapters import GuidanceAdapter
from stages.base.denoiser import denoisers_of, predictions_of
from stages.base.hooks import Call, watch_steps
from stages.base.loading import load_pipeline
from stages.base.sampling import Request, guider_of, sample, scale_keyword, undecoded
from stages.errors import UserError
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.layout import Layout
from stages.generate.plan import GOLDEN_RATIO
from stages.generate.timesteps import shifted_timesteps
from stages.records.dataset import Dataset
from stages.train.base import load_base
from stages.train.selection import SelectedSample
from stages.train.student import Student
from stages.train.trainer import Trainer
from stages.train.window import load
from tests.conftest import generate, generate_config, train_config
from tests.pipelines_zoo.gathered import gather
from tests.pipelines_zoo.refusals import REFUSALS
from tests.pipelines_zoo.specimen import Specimen

pytestmark = pytest.mark.zoo
ZOO = gather()
STEPS, SCALE = 3, 3.0
TOLERANCE = 2e-3
SHIFT = 0.5 * GOLDEN_RATIO  # of the first unit


def config_of(specimen: Specimen, folder: Path, **changes: Any) -> GenerateConfig:
    """Return a configuration of two conditions, each with two trajectories, in one unit."""
    conditions = list(specimen.conditions)
    if "class_label" in conditions[0]:
        asked: dict[str, Any] = {"class_labels": [condition["class_label"] for condition in conditions]}
    else:
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, conditions)))
        asked = {"prompts": str(folder / "prompts.jsonl")}
    config = generate_config(
        specimen.save(folder / "teacher"),
        folder / "data",
        num_trajectories=4,
        trajectories_per_unit=4,
        num_inference_steps=STEPS,
        guidance_scale=[2.0, 5.0],
        storage_dtype="float32",
        shift_timesteps=specimen.shifted,
        **asked,
        **changes,
    )
    config.teacher = TeacherConfig(config.teacher.pretrained_model_name_or_path, call=dict(specimen.arguments))
    return config


def load_whole(dataset: Dataset, specimen: Specimen) -> Any:
    """Load the untouched pipeline of a dataset's teacher."""
    pipe: Any = load_pipeline(dataset.info.teacher.pretrained_model_name_or_path)
    if getattr(getattr(specimen.build(), "vae", None), "use_tiling", False):
        pipe.vae.enable_tiling()
    return pipe


def layout_of(dataset: Dataset) -> Layout:
    return Layout(**vars(dataset.info.teacher.layout))


class Run:
    """One call of a pipeline: each step's denoiser calls and scheduler inputs, and the final latents.

    Args:
        scale: the pipeline's number; None for no guidance.
        shifted: whether its timesteps are those of the first unit.
    """

    def __init__(self, pipe: Any, layout: Layout, request: Request, scale: float | None, shifted: bool) -> None:
        self.calls: list[list[Call]] = []
        self.received: list[list[Tensor]] = []
        self.latents: list[Tensor] = []
        settings = dict(layout.no_guidance if scale is None else {})
        number = scale or 1.0
        if guider_of(pipe) is None:
            number = settings.pop(scale_keyword(pipe), number)
        asked = Request(request.conditions, request.seeds, STEPS, request.arguments | settings)
        with ExitStack() as stack:
            stack.enter_context(undecoded(pipe))
            if shifted:
                stack.enter_context(shifted_timesteps(pipe.scheduler, SHIFT))
            streams = len(layout.target_channels)
            stack.enter_context(watch_steps(pipe, self._see, self.latents.append, streams))
            sample(pipe, asked, number)

    def _see(self, calls: list[Call], received: list[Tensor], timestep: Any) -> None:
        self.calls.append(calls)
        self.received.append(received)

    @property
    def end(self) -> Tensor:
        return self.latents[-1]


@contextmanager
def predicting(pipe: Any, targets: Tensor, channels: Sequence[int]) -> Iterator[None]:
    """Make the pipeline's denoisers predict these targets `[steps, ...]` in turn within the context, for one sample."""
    left = list(targets)

    def predict(module: nn.Module, args: Any, output: Any) -> None:
        prediction = output if isinstance(output, Tensor) else output[0]
        target = left.pop(0).flatten()
        parts = [prediction] if len(channels) == 1 else predictions_of(output)  # the tensors of a list would be copies
        for part, count in zip(parts, channels, strict=False):
            into = part[0][:count] if count > 0 else part[0][count:]
            own, target = target[: into.numel()], target[into.numel() :]
            into.copy_(own.view(into.shape))

    handles = [module.register_forward_hook(predict) for module in denoisers_of(pipe).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert not left


def close(found: Tensor, expected: Tensor) -> bool:
    distance = float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6))
    return distance < TOLERANCE


@pytest.mark.parametrize("name", [name for name in ZOO if name not in REFUSALS])
def test_a_pipeline_works(name: str, tmp_path: Path) -> None:
    specimen = ZOO[name]
    dataset = Dataset(generate(config_of(specimen, tmp_path)))
    check_records(dataset, specimen)
    for denoiser in dataset.info.teacher.denoisers:
        check_training(dataset, specimen, denoiser, tmp_path / denoiser)


def check_records(dataset: Dataset, specimen: Specimen) -> None:
    """Check that the records equal the untouched pipeline, and that predicting them in one pass gives its result."""
    layout, pipe = layout_of(dataset), load_whole(dataset, specimen)
    rows = sorted(dataset.manifest.to_pylist(), key=lambda row: (row["trajectory"], row["key"]))
    for trajectory in (0, 1):
        own = [row for row in rows if row["trajectory"] == trajectory]
        records = load(dataset, [*map(SelectedSample, own)])
        targets = records.take(torch.arange(len(records))).target
        request = Request([specimen.conditions[trajectory]], [own[0]["seed"]], STEPS, dict(specimen.arguments))
        guided = Run(pipe, layout, request, own[0]["scale"] - layout.scale_offset, specimen.shifted)
        seen = [layout.conditional(calls, 1) for calls in guided.calls]
        expected = [layout.target(received, one) for received, one in zip(guided.received, seen, strict=True)]
        assert len(targets) == len(expected)
        for target, handed in zip(targets, expected, strict=True):
            assert close(target, handed[0]), "the records differ from the untouched pipeline"
        with predicting(pipe, targets, layout.target_channels):
            one_pass = Run(pipe, layout, request, None, specimen.shifted)
        assert [[layout.arguments.rows(call.inputs) for call in calls] for calls in one_pass.calls] == [[1]] * len(
            targets
        )
        assert close(one_pass.end, guided.end), "a perfect student does not reproduce two passes"


def decodable(dataset: Dataset) -> str | None:
    """The folder of the teacher, if a VAE in it decodes the latents by diffusers' convention."""
    teacher = dataset.info.teacher.pretrained_model_name_or_path
    by_convention = all(size.decoder_input for size in dataset.info.sizes.values())
    return teacher if by_convention and Path(teacher, "vae").exists() else None


def check_training(dataset: Dataset, specimen: Specimen, denoiser: str, folder: Path) -> None:
    """Check that an adapter trains: untrained, one pass is no guidance; trained, it is exported.

    Fused and with hooks, the trained adapter gives the same.
    """
    layout, pipe = layout_of(dataset), load_whole(dataset, specimen)
    data = Path(dataset.root.where("manifest.parquet")).parent
    vae = decodable(dataset)
    config = train_config(
        data, folder, max_train_steps=2, validation_share=0.5, denoiser=denoiser, vae_name_or_path=vae
    )
    request = Request([specimen.conditions[0]], [3], STEPS, dict(specimen.arguments))
    unguided = Run(pipe, layout, request, None, specimen.shifted)
    untrained = Student.create(dataset, config.adapter, load_base(dataset, denoiser=denoiser), name=denoiser).adapter
    untrained.detach()
    untrained.attach(pipe)
    one_pass = Run(pipe, layout, request, SCALE, specimen.shifted)
    untrained.detach()
    assert [len(calls) for calls in one_pass.calls] == [1] * len(one_pass.calls)
    assert close(one_pass.end, unguided.end), "untrained, one pass differs from no guidance"
    trainer = Trainer(config)
    trainer.run()
    assert (folder / "held_out").exists() == (vae is not None and trainer.validation.sampling is not None)
    adapter = GuidanceAdapter.from_pretrained(folder)
    adapter.attach(pipe)
    fused = Run(pipe, layout, request, SCALE, specimen.shifted)
    adapter.detach()
    with adapter.attach(denoisers_of(pipe)[denoiser]).guidance_scale(SCALE + layout.scale_offset):
        hooked = Run(pipe, layout, request, None, specimen.shifted)
    adapter.detach()
    assert close(fused.end, hooked.end)
    adapter.export_lora(folder / "peft", SCALE, "peft")


@pytest.mark.parametrize("name", [name for name in ZOO if name in REFUSALS])
def test_a_pipeline_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(REFUSALS[name])) as refused:
        generate(config_of(ZOO[name], tmp_path))
    assert len(str(refused.value).splitlines()) == 1
    assert not list((tmp_path / "data").glob("shards/*"))
