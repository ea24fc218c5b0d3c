"""Exported files, loaded by stock tools in a process that cannot import this project."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.adapters import AdapterConfig, GuidanceAdapter, LoRA
from stages.adapters.export import FORMATS, how_to_load
from stages.adapters.lora import LoRASite
from stages.adapters.metadata import AdapterMetadata, Base
from stages.base.denoiser import denoiser_of, fingerprint
from stages.base.sampling import CALL_DEFAULTS
from stages.errors import StorageError, UserError
from tests.conftest import tiny_dit
from tests.support import stock_tools
from tests.support.families import ARGUMENTS, FAMILIES, PROMPTS, WIDTH, build

SCALE, HIDDEN_SIZE = 3.0, 16
DIT = "dit"
EVERY = [*FAMILIES, DIT]
NOT_BY_DIFFUSERS = ("pixart_sigma", DIT)  # diffusers loads no LoRA into these pipelines
KOHYA_BY_DIFFUSERS = ("stable_diffusion", "stable_diffusion_v", "stable_diffusion_xl", "qwen_image", "wan")


@dataclass
class Exported:
    """An adapter of a tiny pipeline in every format for it, and the images of the fused base."""

    adapter: LoRA
    files: dict[str, Path]
    job: dict[str, Any]


def new_adapter(pipe: Any, sites: tuple[str, ...] = ("*",), ranks: tuple[int, int] = (3, 2), **metadata: Any) -> LoRA:
    """Create a LoRA at every linear layer and convolution, with alternating ranks, as if it were trained."""
    subfolder, denoiser = denoiser_of(pipe)
    known = {
        "conditions": {"encoder_hidden_states": {"kind": "tokens", "width": WIDTH}},
        "scale_range": [1.0, 8.0],
        "prediction_type": "epsilon",
        "base": Base(
            pretrained_model_name_or_path="someone/base",
            pipeline_class=type(pipe).__name__,
            denoiser_class=type(denoiser).__name__,
            denoiser_subfolder=subfolder,
            denoiser_fingerprint="f" * 64,
        ),
    }
    torch.manual_seed(1)
    config = AdapterConfig("lora", sites=list(sites), hidden_size=HIDDEN_SIZE, rank=ranks[0])
    adapter = GuidanceAdapter.for_denoiser(config, denoiser, AdapterMetadata(**known | metadata))
    assert isinstance(adapter, LoRA)
    for name in list(adapter.shapes)[::2]:
        width_in, width_out, *kernel = adapter.shapes[name]
        adapter.sites[name.replace(".", "/")] = LoRASite(width_in, width_out, ranks[1], 0, tuple(kernel))
    for site in adapter.sites.values():
        assert isinstance(site, LoRASite)
        torch.nn.init.normal_(site.lora_B.weight, std=0.05)
        torch.nn.init.normal_(site.curves, mean=0.3, std=0.05)
    return adapter


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Export an adapter of every family."""
    return {family: export_every_format(family, tmp_path_factory.mktemp(family)) for family in EVERY}


def export_every_format(family: str, folder: Path) -> Exported:
    pipe = tiny_dit() if family == DIT else build(family)
    adapter = new_adapter(pipe)
    files = {"peft": adapter.export_lora(folder / "peft", SCALE, "peft")}
    if family not in NOT_BY_DIFFUSERS:
        files["diffusers"] = adapter.export_lora(folder / "diffusers", SCALE)
    if family != DIT:
        files["kohya"] = adapter.export_lora(folder / "kohya.safetensors", SCALE, "kohya")
    arguments = {"class_labels": [1, 2]} if family == DIT else {"prompt": PROMPTS}
    arguments |= CALL_DEFAULTS.get(type(pipe).__name__, {}) | ARGUMENTS.get(family, {})
    pipe.save_pretrained(folder / "pipe")
    save_file({"images": fused_images(pipe, adapter, arguments)}, folder / "expected.safetensors")
    job = {"pipe": str(folder / "pipe"), "arguments": arguments, "expected": str(folder / "expected.safetensors")}
    return Exported(adapter, files, job)


def fused_images(pipe: Any, adapter: LoRA, arguments: dict[str, Any]) -> Tensor:
    """Return the images of the fused base, which differ from the unfused one's."""
    bare = stock_tools.images(pipe, arguments)
    adapter.attach(denoiser_of(pipe)[1]).fuse(SCALE)
    fused = stock_tools.images(pipe, arguments)
    adapter.unfuse()
    adapter.detach()
    assert (fused - bare).abs().max() > 0.02 * bare.abs().max()
    return fused


LOADED = [
    (family, format)
    for family in EVERY
    for format in FORMATS
    if format == "peft"
    or (format == "diffusers" and family not in NOT_BY_DIFFUSERS)
    or (format == "kohya" and family in KOHYA_BY_DIFFUSERS)
]


@pytest.fixture(scope="module")
def differences(exported: dict[str, Exported]) -> dict[tuple[str, str], float]:
    """Return how far each export loaded by diffusers or peft is from the fused pipeline."""
    jobs = [
        exported[family].job | {"format": format, "file": str(exported[family].files[format])}
        for family, format in LOADED
    ]
    done = subprocess.run(
        [sys.executable, "-I", stock_tools.__file__],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(LOADED, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("family", "format"), LOADED)
def test_a_process_without_this_project_loads_it(
    differences: dict[tuple[str, str], float], family: str, format: str
) -> None:
    assert differences[family, format] < 1e-5


# Where ComfyUI puts the change of a diffusers layer: the name of the layer, and the first row in multiples of the
# change's height. From `mmdit_to_diffusers`, `pixart_to_diffusers` and `flux_to_diffusers` of
# comfy/utils.py (Comfy-Org/ComfyUI, 09708eae), and of Chroma's guidance layers from comfy/ldm/chroma/layers.py and
# comfy/ldm/flux/layers.py.
QKV = {"to_q": 0, "to_k": 1, "to_v": 2}
COMFYUI: dict[str, dict[str, tuple[str, int]]] = {
    "stable_diffusion_3": {
        "context_embedder": ("context_embedder", 0),
        "time_text_embed.timestep_embedder.linear_1": ("t_embedder_mlp_0", 0),
        "time_text_embed.timestep_embedder.linear_2": ("t_embedder_mlp_2", 0),
        "time_text_embed.text_embedder.linear_1": ("y_embedder_mlp_0", 0),
        "time_text_embed.text_embedder.linear_2": ("y_embedder_mlp_2", 0),
        "pos_embed.proj": ("x_embedder_proj", 0),
        "norm_out.linear": ("final_layer_adaLN_modulation_1", 0),
        "proj_out": ("final_layer_linear", 0),
        "transformer_blocks.N.norm1.linear": ("joint_blocks_N_x_block_adaLN_modulation_1", 0),
        **{f"transformer_blocks.N.attn.{q}": ("joint_blocks_N_x_block_attn_qkv", i) for q, i in QKV.items()},
        "transformer_blocks.N.attn.to_out.0": ("joint_blocks_N_x_block_attn_proj", 0),
        "transformer_blocks.N.ff.net.0.proj": ("joint_blocks_N_x_block_mlp_fc1", 0),
        "transformer_blocks.N.ff.net.2": ("joint_blocks_N_x_block_mlp_fc2", 0),
        "transformer_blocks.N.norm1_context.linear": ("joint_blocks_N_context_block_adaLN_modulation_1", 0),
        "transformer_blocks.N.attn.add_q_proj": ("joint_blocks_N_context_block_attn_qkv", 0),
        "transformer_blocks.N.attn.add_k_proj": ("joint_blocks_N_context_block_attn_qkv", 1),
        "transformer_blocks.N.attn.add_v_proj": ("joint_blocks_N_context_block_attn_qkv", 2),
        "transformer_blocks.N.attn.to_add_out": ("joint_blocks_N_context_block_attn_proj", 0),
        "transformer_blocks.N.ff_context.net.0.proj": ("joint_blocks_N_context_block_mlp_fc1", 0),
        "transformer_blocks.N.ff_context.net.2": ("joint_blocks_N_context_block_mlp_fc2", 0),
    },
    "pixart_sigma": {
        "pos_embed.proj": ("x_embedder_proj", 0),
        "caption_projection.linear_1": ("y_embedder_y_proj_fc1", 0),
        "caption_projection.linear_2": ("y_embedder_y_proj_fc2", 0),
        "adaln_single.emb.timestep_embedder.linear_1": ("t_embedder_mlp_0", 0),
        "adaln_single.emb.timestep_embedder.linear_2": ("t_embedder_mlp_2", 0),
        "adaln_single.linear": ("t_block_1", 0),
        "proj_out": ("final_layer_linear", 0),
        **{f"transformer_blocks.N.attn1.{q}": ("blocks_N_attn_qkv", i) for q, i in QKV.items()},
        "transformer_blocks.N.attn1.to_out.0": ("blocks_N_attn_proj", 0),
        "transformer_blocks.N.attn2.to_q": ("blocks_N_cross_attn_q_linear", 0),
        "transformer_blocks.N.attn2.to_k": ("blocks_N_cross_attn_kv_linear", 0),
        "transformer_blocks.N.attn2.to_v": ("blocks_N_cross_attn_kv_linear", 1),
        "transformer_blocks.N.attn2.to_out.0": ("blocks_N_cross_attn_proj", 0),
        "transformer_blocks.N.ff.net.0.proj": ("blocks_N_mlp_fc1", 0),
        "transformer_blocks.N.ff.net.2": ("blocks_N_mlp_fc2", 0),
    },
    "chroma": {
        "x_embedder": ("img_in", 0),
        "context_embedder": ("txt_in", 0),
        "proj_out": ("final_layer_linear", 0),
        "distilled_guidance_layer.in_proj": ("distilled_guidance_layer_in_proj", 0),
        "distilled_guidance_layer.out_proj": ("distilled_guidance_layer_out_proj", 0),
        "distilled_guidance_layer.layers.N.linear_1": ("distilled_guidance_layer_layers_N_in_layer", 0),
        "distilled_guidance_layer.layers.N.linear_2": ("distilled_guidance_layer_layers_N_out_layer", 0),
        **{f"transformer_blocks.N.attn.{q}": ("double_blocks_N_img_attn_qkv", i) for q, i in QKV.items()},
        "transformer_blocks.N.attn.to_out.0": ("double_blocks_N_img_attn_proj", 0),
        "transformer_blocks.N.ff.net.0.proj": ("double_blocks_N_img_mlp_0", 0),
        "transformer_blocks.N.ff.net.2": ("double_blocks_N_img_mlp_2", 0),
        "transformer_blocks.N.attn.add_q_proj": ("double_blocks_N_txt_attn_qkv", 0),
        "transformer_blocks.N.attn.add_k_proj": ("double_blocks_N_txt_attn_qkv", 1),
        "transformer_blocks.N.attn.add_v_proj": ("double_blocks_N_txt_attn_qkv", 2),
        "transformer_blocks.N.attn.to_add_out": ("double_blocks_N_txt_attn_proj", 0),
        "transformer_blocks.N.ff_context.net.0.proj": ("double_blocks_N_txt_mlp_0", 0),
        "transformer_blocks.N.ff_context.net.2": ("double_blocks_N_txt_mlp_2", 0),
        **{f"single_transformer_blocks.N.attn.{q}": ("single_blocks_N_linear1", i) for q, i in QKV.items()},
        "single_transformer_blocks.N.proj_mlp": ("single_blocks_N_linear1", 3),
        "single_transformer_blocks.N.proj_out": ("single_blocks_N_linear2", 0),
    },
}
# Layers that give the shift first in ComfyUI and the scale first in diffusers (`swap_scale_shift` in these tables).
SHIFT_FIRST = ("norm_out.linear", "transformer_blocks.1.norm1_context.linear")
HEIGHTS_OF_MLP = 4  # proj_mlp is four times as high as the three before it


def as_comfyui_does(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the change of each layer in a file: `alpha / rank * up down`."""
    names = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    parts = {name: [tensors[f"{name}.{part}.weight"].flatten(1) for part in ("lora_up", "lora_down")] for name in names}
    assert len(tensors) == 3 * len(names)
    return {
        name.removeprefix("lora_unet_"): tensors[f"{name}.alpha"] / len(down) * (up @ down)
        for name, (up, down) in parts.items()
    }


@pytest.mark.parametrize("family", list(COMFYUI))
def test_comfyui_finds_the_change_of_every_layer_by_its_own_name(exported: dict[str, Exported], family: str) -> None:
    adapter, file = exported[family].adapter, exported[family].files["kohya"]
    changes = as_comfyui_does(load_file(file))
    found = set()
    for layer, (down, up) in adapter.lora_weights(SCALE).items():
        block = re.search(r"(?:blocks|layers)\.(\d+)", layer)
        name, place = COMFYUI[family][re.sub(r"(blocks|layers)\.\d+", r"\1.N", layer)]
        name = name.replace("_N_", f"_{block[1]}_") if block else name
        height = len(up) // (HEIGHTS_OF_MLP if place == 3 else 1)
        change = changes[name][place * height :][: len(up)]
        if layer in SHIFT_FIRST:
            change = torch.cat(change.chunk(2)[::-1])
        torch.testing.assert_close(change, up.flatten(1) @ down.flatten(1), atol=1e-6, rtol=1e-5)
        found.add(name)
    assert found == changes.keys()


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_v", "stable_diffusion_xl", "qwen_image"])
def test_layers_that_comfyui_knows_by_diffusers_names_keep_them(exported: dict[str, Exported], family: str) -> None:
    """Names of `unet_to_diffusers` in comfy/utils.py, and of comfy/ldm/qwen_image/model.py."""
    by_original_name = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    names = {by_original_name.get(layer, layer).replace(".", "_") for layer in exported[family].adapter.shapes}
    assert as_comfyui_does(load_file(exported[family].files["kohya"])).keys() == names


def test_the_unadapted_part_of_a_stacked_layer_does_not_change(tmp_path: Path) -> None:
    sites = ("single_transformer_blocks.*.attn.to_k", "single_transformer_blocks.*.proj_mlp", "*.add_v_proj")
    adapter = new_adapter(build("chroma"), sites)
    changes = as_comfyui_does(load_file(adapter.export_lora(tmp_path / "lora.safetensors", SCALE, "kohya")))
    wanted = {name: up @ down for name, (down, up) in adapter.lora_weights(SCALE).items()}
    key, mlp = (wanted[f"single_transformer_blocks.0.{name}"] for name in ("attn.to_k", "proj_mlp"))
    none = torch.zeros_like(key)
    torch.testing.assert_close(changes["single_blocks_0_linear1"], torch.cat([none, key, none, mlp]))
    value = wanted["transformer_blocks.0.attn.add_v_proj"]
    torch.testing.assert_close(changes["double_blocks_0_txt_attn_qkv"], torch.cat([none, none, value]))


def test_the_header_describes_the_export(tmp_path: Path) -> None:
    table = [{"strength": 0.5, "guidance_scale": 2.1}, {"strength": 1.0, "guidance_scale": 3.0}]
    tokens = {"encoder_hidden_states": {"kind": "tokens", "width": 1024}}
    info = {"prediction_type": "v_prediction", "guidance_gain": 1.05, "dial": {"3": table}, "conditions": tokens}
    adapter = new_adapter(build("stable_diffusion_v"), **info)
    file = adapter.export_lora(tmp_path / "folder", SCALE)
    header = header_of(file)
    content = file.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert header["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"
    assert header["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert header["modelspec.prediction_type"] == "v"
    assert {f"modelspec.{field}" for field in ("sai_model_spec", "implementation", "title", "date")} <= header.keys()
    assert header["guidance.base_model"] == "someone/base"
    assert (header["guidance.scale"], header["guidance.trained_range"], header["guidance.gain"]) == ("3", "1,8", "1.05")
    assert header["guidance.adapter_fingerprint"] == fingerprint(adapter)
    assert json.loads(header["guidance.dial"]) == table
    assert "guidance.dial" not in header_of(adapter.export_lora(tmp_path / "folder", 4.0))


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize(("family", "architecture"), [(DIT, "DiTTransformer2DModel"), ("chroma", "chroma")])
def test_the_header_names_an_architecture(exported: dict[str, Exported], family: str, architecture: str) -> None:
    assert header_of(exported[family].files["peft"])["modelspec.architecture"] == f"{architecture}/lora"


@pytest.mark.parametrize(
    ("family", "format", "info"),
    [
        ("stable_diffusion", "diffusers", 'loaded by pipe.load_lora_weights("'),
        ("wan", "peft", 'loaded by PeftModel.from_pretrained(pipe.transformer, "'),
        ("stable_diffusion_3", "kohya", "loaded by ComfyUI, sd-scripts"),
    ],
)
def test_the_way_to_load_an_export_is_stated(
    exported: dict[str, Exported], family: str, format: str, info: str
) -> None:
    assert info in how_to_load(exported[family].adapter, exported[family].files[format], format)


@pytest.mark.parametrize(("family", "others"), [("pixart_sigma", "peft or kohya"), (DIT, "peft")])
def test_an_export_that_diffusers_cannot_load_is_refused(
    exported: dict[str, Exported], family: str, others: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"format=diffusers: diffusers loads no LoRA into a .*: use format={others}$"):
        exported[family].adapter.export_lora(tmp_path / "out", SCALE)
    assert not (tmp_path / "out").exists()


def test_without_a_known_pipeline_the_denoiser_loads_it(exported: dict[str, Exported]) -> None:
    done, base = exported["wan"], exported["wan"].adapter.metadata.base
    metadata = replace(done.adapter.metadata, base=replace(base, pipeline_class=None))
    line = how_to_load(LoRA(done.adapter.config, done.adapter.shapes, metadata), done.files["diffusers"], "diffusers")
    pipe = DiffusionPipeline.from_pretrained(done.job["pipe"])
    eval(line.removeprefix("loaded by "), {"pipe": pipe})
    loaded = stock_tools.images(pipe, done.job["arguments"])
    torch.testing.assert_close(loaded, load_file(done.job["expected"])["images"], atol=1e-5, rtol=1e-5)


@pytest.fixture
def adapter() -> LoRA:
    return new_adapter(tiny_dit(), sites=("proj_out_1",))


@pytest.mark.parametrize(
    ("name", "scale", "format", "message"),
    [
        ("out", 1.0, "diffusers", "guidance_scale=1: name a scale above 1"),
        ("out", float("nan"), "diffusers", "guidance_scale=nan: name a scale above 1"),
        ("out", SCALE, "onnx", "format=onnx: one of diffusers, peft, kohya"),
        (
            "out.safetensors",
            SCALE,
            "kohya",
            "nobody has published names for the layers of a DiTTransformer2DModel: use",
        ),
        ("out", SCALE, "kohya", "format=kohya writes a file: name one that ends in .safetensors"),
        ("out.safetensors", SCALE, "peft", "format=peft writes a folder: name one"),
    ],
)
def test_an_impossible_export_is_refused_before_anything_is_written(
    adapter: LoRA, tmp_path: Path, name: str, scale: float, format: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        adapter.export_lora(tmp_path / name, scale, format)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_sees_more_than_the_scale_is_refused(adapter: LoRA, tmp_path: Path) -> None:
    config = AdapterConfig("lora", ["proj_out_1"], ["timestep"], HIDDEN_SIZE, 3)
    seeing = LoRA(config, adapter.shapes, replace(adapter.metadata, conditions={}))
    with pytest.raises(UserError, match=r"sees timestep too.*train it with adapter.conditions=\[\]"):
        seeing.export_lora(tmp_path / "out", SCALE)
    assert not list(tmp_path.iterdir())


def test_a_layer_without_a_published_name_is_refused(tmp_path: Path) -> None:
    adapter = new_adapter(build("wan"), sites=("proj_out",))
    adapter.shapes = {"controlnet.proj": adapter.shapes["proj_out"]}
    with pytest.raises(UserError, match="controlnet.proj has no published name: use format=peft"):
        adapter.export_lora(tmp_path / "out.safetensors", SCALE, "kohya")


def test_an_adapters_own_folder_is_not_written_to(adapter: LoRA, tmp_path: Path) -> None:
    adapter.save_pretrained(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="holds an adapter of this project: name another folder"):
        adapter.export_lora(tmp_path, SCALE, "peft")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_scale_outside_the_training_warns(adapter: LoRA, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="guidance_scale 9 is outside the range 1 to 8"):
        adapter.export_lora(tmp_path, 9.0, "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.export_lora(tmp_path, 8.0, "peft")


def test_an_export_is_written_whole_or_not_at_all(adapter: LoRA, tmp_path: Path) -> None:
    adapter.export_lora(tmp_path, SCALE, "peft")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # simulates a full disk: both fail in the middle of a write
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written: File too large"):
            adapter.export_lora(tmp_path, 4.0, "peft")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
