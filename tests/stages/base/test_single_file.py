"""Teachers and bases in one file: in safetensors, and in GGUF where the package is installed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from stages.base.denoiser import fingerprint
from stages.base.loading import denoiser_config, load_denoiser, load_pipeline
from stages.base.single_file import holds_a_pipeline
from stages.errors import UserError
from stages.generate.config import TeacherConfig
from stages.records.dataset import Dataset
from stages.train.base import load_base
from stages.train.trainer import Trainer
from tests.conftest import generate, generate_config, small_adapter, train_config
from tests.support.families import qwen_image, stable_diffusion_3

CLASS = "SD3Transformer2DModel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline."""
    path = tmp_path_factory.mktemp("sd3") / "folder"
    torch.manual_seed(0)
    stable_diffusion_3().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """The denoiser's weights in one file."""
    return Path(
        shutil.copy(folder / "transformer" / "diffusion_pytorch_model.safetensors", folder.parent / "sd3.safetensors")
    )


@pytest.fixture(scope="module")
def gguf(folder: Path, file: Path) -> Path:
    """The denoiser's weights in GGUF: those of linear layers with 8 bits."""
    library = pytest.importorskip("gguf")
    path, kind = folder.parent / "sd3-Q8_0.gguf", library.GGMLQuantizationType.Q8_0
    writer = library.GGUFWriter(path, "sd3")
    denoiser = load_denoiser(str(folder), "transformer", CLASS, torch.float32)
    linear = {f"{name}.weight" for name, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, tensor in denoiser.state_dict().items():
        values = tensor.numpy().astype(np.float32)
        if name in linear and values.shape[-1] % 32 == 0:
            writer.add_tensor(name, library.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def recorded(folder: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose teacher's denoiser is one file."""
    output = tmp_path_factory.mktemp("recorded")
    (output / "prompts.txt").write_text("a cat\na dog\n")
    config = generate_config(file, output / "data", prompts=str(output / "prompts.txt"), num_trajectories=6)
    config.teacher = TeacherConfig(str(file), config=str(folder))
    return generate(config)


def test_a_file_of_a_denoiser_holds_the_folders_weights(folder: Path, file: Path) -> None:
    whole = load_denoiser(str(folder), "transformer", CLASS, torch.float32)
    one = load_denoiser(str(file), "transformer", CLASS, torch.float32, config=str(folder))
    assert fingerprint(one) == fingerprint(whole)
    assert not any(parameter.requires_grad for parameter in one.parameters())
    pipe: Any = load_pipeline(str(file), config=str(folder))
    assert fingerprint(pipe.transformer) == fingerprint(whole)
    assert pipe.text_encoder_3 is not None


def test_a_checkpoint_of_a_whole_pipeline_is_told_by_its_names(tmp_path: Path, file: Path) -> None:
    save_file({"first_stage_model.encoder.weight": torch.ones(1)}, tmp_path / "whole.safetensors")
    assert holds_a_pipeline(str(tmp_path / "whole.safetensors"))
    assert holds_a_pipeline("older.ckpt")
    assert not holds_a_pipeline(str(file))
    assert not holds_a_pipeline("quantised.gguf")


def test_a_teacher_in_one_file_makes_records_and_is_the_base(recorded: Path, folder: Path, tmp_path: Path) -> None:
    dataset = Dataset(recorded)
    assert fingerprint(load_base(dataset)) == dataset.info.teacher.denoiser_fingerprint
    assert fingerprint(load_base(dataset, str(folder))) == dataset.info.teacher.denoiser_fingerprint
    config = train_config(recorded, tmp_path / "run", adapter=small_adapter("offset"), max_train_steps=2)
    assert Trainer(config).run()["steps"] == 2


def test_a_quantised_base_in_gguf_is_trained_on(recorded: Path, gguf: Path, tmp_path: Path) -> None:
    config = train_config(recorded, tmp_path / "run", adapter=small_adapter("offset"), max_train_steps=2)
    config.pretrained_model_name_or_path = str(gguf)
    trainer = Trainer(config)
    assert "sd3-Q8_0.gguf, which cannot be compared with the teacher's weights" in trainer.foresight
    assert trainer.run()["steps"] == 2
    exact, quantised = load_base(Dataset(recorded)), load_base(Dataset(recorded), str(gguf))
    name = "transformer_blocks.0.attn.to_q"
    given = torch.randn(4, exact.get_submodule(name).in_features)
    one, other = (base.get_submodule(name)(given) for base in (exact, quantised))
    assert 0 < (one - other).norm() < 0.02 * one.norm()


def test_what_a_file_lacks_is_named(folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ("transformer", CLASS)
    with pytest.raises(UserError, match=r"missing.safetensors: no such file"):
        denoiser_config("missing.safetensors", *place, config=str(folder))
    with pytest.raises(UserError, match=r"a file holds weights alone: name .* \(teacher.config=...\)"):
        load_pipeline(str(file))
    with pytest.raises(UserError, match="diffusers loads no DiTTransformer2DModel from one file: name a folder"):
        load_denoiser(str(file), "transformer", "DiTTransformer2DModel", torch.float32, config=str(folder))
    save_file({"vae.nothing": torch.ones(1)}, tmp_path / "whole.safetensors")
    with pytest.raises(UserError, match=f"whole.safetensors: no .* loaded from it: its weights do not fit {folder}: "):
        load_pipeline(str(tmp_path / "whole.safetensors"), config=str(folder))
    with pytest.raises(UserError, match="diffusers loads no DiTPipeline from one file: name a folder"):
        load_pipeline(str(tmp_path / "whole.safetensors"), config=str(folder), pipeline_class="DiTPipeline")
    (tmp_path / "broken.ckpt").write_bytes(b"no weights")
    with pytest.raises(UserError, match="broken.ckpt: no .* could be loaded from it: Unable to load weights"):
        load_pipeline(str(tmp_path / "broken.ckpt"), config=str(folder))
    (tmp_path / "any.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"any.gguf: gguf is not installed: pip install '.\[gguf\]'"):
        denoiser_config(str(tmp_path / "any.gguf"), *place, config=str(folder))


def test_what_a_file_holds_instead_of_a_denoiser_is_told(folder: Path, file: Path, tmp_path: Path) -> None:
    own = load_file(file)
    last, shape = "proj_out.weight", r"\[4, 4\], not \[\d+, \d+\]"
    unfit = f"wrong.safetensors: no {CLASS} could be loaded from it: its weights do not fit {folder}: "
    for content, message in (
        ({"other": torch.ones(1)}, f"{unfit}their names are others: the first is other$"),
        (own | {last: torch.zeros(4, 4)}, f"{unfit}{last} has shape {shape}$"),
        ({name: weight for name, weight in own.items() if name != last}, f"{unfit}{last} is missing$"),
        (own | {"other": torch.ones(1)}, f"{unfit}other is one too many$"),
        ({f"transformer.{last}.lora_A.weight": torch.ones(1)}, rf"wrong.*: holds a LoRA \(transformer.{last}.lora_A"),
        ({}, "wrong.safetensors: holds no weights$"),
        (None, "wrong.safetensors: not a safetensors file: "),
    ):
        path = tmp_path / "wrong.safetensors"
        path.write_bytes(b"no weights" if content is None else save(content))
        with pytest.raises(UserError, match=message):
            load_denoiser(str(path), "transformer", CLASS, torch.float32, config=str(folder))
        with pytest.raises(UserError, match=message):
            load_pipeline(str(path), config=str(folder))


def test_a_class_whose_weights_diffusers_does_not_convert_lacks_none(tmp_path: Path) -> None:
    pipe = qwen_image()
    pipe.save_pretrained(tmp_path / "folder")
    weights = list(pipe.transformer.state_dict().items())
    place = ("transformer", "QwenImageTransformer2DModel", torch.float32)
    save_file(dict(weights[1:]), tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=f"part.safetensors: no .*: {weights[0][0]} is missing$"):
        load_denoiser(str(tmp_path / "part.safetensors"), *place, config=str(tmp_path / "folder"))
