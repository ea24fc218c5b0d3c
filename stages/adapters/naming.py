"""Other tools' names for a denoiser's layers: one table for each naming.

ComfyUI (`model_lora_keys_unet` in comfy/lora.py) takes a layer of any model by the name that it has in the model's
original code: `lora_unet_` and that name with underscores, or `diffusion_model.` and that name. For a UNet it takes
diffusers' names too, as kohya's sd-scripts write them. The original names are those of ComfyUI's own tables
(`unet_to_diffusers`, `mmdit_to_diffusers`, `pixart_to_diffusers` and `flux_to_diffusers` in comfy/utils.py) and of its
models in comfy/ldm.

There is a naming for SD 1 and 2, SDXL (UNet), SD 3 and 3.5, PixArt, Qwen-Image, Chroma and Wan. Nobody has published
one for DiT, and none of the tools reads it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.adapters.fusing import LowRank
from stages.errors import UserError


@dataclass(frozen=True)
class Naming:
    """One naming of the layers of a class of denoisers.

    Attributes:
        layers: diffusers' names by published name; `{}` stands for a number. Several diffusers layers are stacked in
            one published layer, in this order.
        wider: the width of a stacked layer as a multiple of the others'.
        swapped: published layers that give shift and scale where diffusers' give scale and shift.
        implementation: the code that defines these names; readers: the tools that load such a file.
        prefix, separator: before a published name, and between its parts.
        down, up: the names of A and B; alpha: whether the file holds alpha, which multiplies a change by alpha / rank.
    """

    layers: dict[str, tuple[str, ...]]
    implementation: str
    readers: str
    wider: dict[str, int] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    prefix: str = "lora_unet_"
    separator: str = "_"
    down: str = "lora_down"
    up: str = "lora_up"
    alpha: bool = True

    def renamed(self, weights: LowRank) -> dict[str, Tensor]:
        """Return a file's tensors in this naming, from A and B by layer.

        Raises:
            UserError: a layer has no published name.
        """
        stacks: dict[tuple[str, str], LowRank] = {}
        for layer, change in weights.items():
            pattern, name, numbers = self._find(layer)
            stacks.setdefault((pattern, pattern.format(*numbers)), {})[name] = change
        changes = {name: self._stacked(pattern, parts) for (pattern, name), parts in stacks.items()}
        alpha = Counter(len(down) for down, _ in changes.values()).most_common(1)[0][0]
        tensors: dict[str, Tensor] = {}
        for name, (down, up) in changes.items():
            name = self.prefix + name.replace(".", self.separator)
            if self.alpha:  # one for all, because diffusers mixes up several
                tensors[f"{name}.alpha"], up = torch.tensor(float(alpha)), up * (len(down) / alpha)
            tensors |= {f"{name}.{self.down}.weight": down, f"{name}.{self.up}.weight": up}
        return tensors

    def _find(self, layer: str) -> tuple[str, str, tuple[str, ...]]:
        """Return a layer's published pattern, its diffusers pattern, and its numbers."""
        for published, names in self.layers.items():
            for name in names:
                if match := re.fullmatch(re.escape(name).replace(r"\{\}", r"(\d+)"), layer):
                    return published, name, match.groups()
        raise UserError(f"format=kohya: {layer} has no published name: use format=peft")

    def _stacked(self, published: str, changes: LowRank) -> tuple[Tensor, Tensor]:
        """Stack the changes of several layers exactly: the As below each other, the Bs on the diagonal."""
        names = self.layers[published]
        if len(names) == 1:
            down, up = changes[names[0]]
            # Only layers with two outputs: those with gates too have the same order everywhere.
            swaps = published in self.swapped and len(up) == 2 * down.shape[1]
            return down, torch.cat(up.chunk(2)[::-1]) if swaps else up
        width = next(len(up) // self.wider.get(name, 1) for name, (_, up) in changes.items())
        none = {name: torch.zeros(width * self.wider.get(name, 1), 0) for name in names}
        ups = [changes[name][1] if name in changes else none[name] for name in names]
        return torch.cat([changes[name][0] for name in names if name in changes]), torch.block_diag(*ups)


def same(*names: str) -> dict[str, tuple[str, ...]]:
    """Map layers with the same name in both."""
    return {name: (name,) for name in names}


def renames(published: str, prefix: str, parts: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Map the layers of a part of the denoiser; spaces separate several diffusers names."""
    return {published + part: tuple(prefix + name for name in names.split()) for part, names in parts.items()}


UNET_BLOCKS = ("down_blocks.{}", "mid_block", "up_blocks.{}")
UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_PARTS = (
    *(f"resnets.{{}}.{layer}" for layer in ("conv1", "conv2", "conv_shortcut", "time_emb_proj")),
    *(f"attentions.{{}}.{layer}" for layer in ("proj_in", "proj_out")),
    *(f"attentions.{{}}.transformer_blocks.{{}}.attn1.{layer}" for layer in UNET_ATTENTION),
    *(f"attentions.{{}}.transformer_blocks.{{}}.attn2.{layer}" for layer in UNET_ATTENTION),
    *(f"attentions.{{}}.transformer_blocks.{{}}.ff.net.{layer}" for layer in ("0.proj", "2")),
    "downsamplers.0.conv",
    "upsamplers.0.conv",
)
UNET = Naming(
    same("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    | same(*(f"{block}.{part}" for block in UNET_BLOCKS for part in UNET_PARTS))
    # By the original name, because diffusers misreads its own names here.
    | {"label_emb.0.0": ("add_embedding.linear_1",), "label_emb.0.2": ("add_embedding.linear_2",)},
    implementation="diffusers",
    readers="ComfyUI, sd-scripts (which leaves out the embeddings of timestep and size, conv_in and conv_out), "
    "pipe.load_lora_weights",
)
MMDIT_EMBEDDERS = {
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
MMDIT_IMAGE = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "attn.proj": "attn.to_out.0",
    "attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "attn2.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
MMDIT_TEXT = {
    "adaLN_modulation.1": "norm1_context.linear",
    "attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "attn.proj": "attn.to_add_out",
    "mlp.fc1": "ff_context.net.0.proj",
    "mlp.fc2": "ff_context.net.2",
}
SD3 = Naming(
    renames("", "", MMDIT_EMBEDDERS)
    | renames("joint_blocks.{}.x_block.", "transformer_blocks.{}.", MMDIT_IMAGE)
    | renames("joint_blocks.{}.context_block.", "transformer_blocks.{}.", MMDIT_TEXT),
    swapped=("final_layer.adaLN_modulation.1", "joint_blocks.{}.context_block.adaLN_modulation.1"),
    implementation="https://github.com/Stability-AI/sd3-ref",
    readers="ComfyUI, sd-scripts",
)
PIXART_EMBEDDERS = {
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
PIXART_BLOCK = {
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
PIXART = Naming(
    renames("", "", PIXART_EMBEDDERS) | renames("blocks.{}.", "transformer_blocks.{}.", PIXART_BLOCK),
    implementation="https://github.com/PixArt-alpha/PixArt-sigma",
    readers="ComfyUI",
)
QWEN_IMAGE = Naming(
    same(
        "img_in",
        "txt_in",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "norm_out.linear",
        "proj_out",
        *(f"transformer_blocks.{{}}.{part}" for part in ("img_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2")),
        *(f"transformer_blocks.{{}}.{part}" for part in ("txt_mod.1", "txt_mlp.net.0.proj", "txt_mlp.net.2")),
        *(f"transformer_blocks.{{}}.attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
        *(f"transformer_blocks.{{}}.attn.add_{letter}_proj" for letter in "qkv"),
    ),
    implementation="https://github.com/QwenLM/Qwen-Image",
    readers="ComfyUI, musubi-tuner (which takes the layers of the blocks), pipe.load_lora_weights",
)
CHROMA_DOUBLE_BLOCK = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
CHROMA_SINGLE_BLOCK = {"linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out"}
CHROMA_GUIDANCE = "distilled_guidance_layer.layers.{}."
CHROMA = Naming(
    renames("", "", {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"})
    | same("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj")
    | renames(CHROMA_GUIDANCE, CHROMA_GUIDANCE, {"in_layer": "linear_1", "out_layer": "linear_2"})
    | renames("double_blocks.{}.", "transformer_blocks.{}.", CHROMA_DOUBLE_BLOCK)
    | renames("single_blocks.{}.", "single_transformer_blocks.{}.", CHROMA_SINGLE_BLOCK),
    wider={"single_transformer_blocks.{}.proj_mlp": 4},
    implementation="https://huggingface.co/lodestones/Chroma",
    readers="ComfyUI, sd-scripts (which leaves out distilled_guidance_layer and final_layer)",
)
WAN_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
WAN_BLOCK = {
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
WAN_EMBEDDERS = {
    "time_embedding.0": "time_embedder.linear_1",
    "time_embedding.2": "time_embedder.linear_2",
    "time_projection.1": "time_proj",
    "text_embedding.0": "text_embedder.linear_1",
    "text_embedding.2": "text_embedder.linear_2",
    "img_emb.proj.1": "image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "image_embedder.ff.net.2",
}
WAN = Naming(
    renames("", "condition_embedder.", WAN_EMBEDDERS)
    | {"head.head": ("proj_out",)}
    | renames("blocks.{}.", "blocks.{}.", WAN_BLOCK)
    | renames("blocks.{}.self_attn.", "blocks.{}.attn1.", WAN_ATTENTION)
    | renames("blocks.{}.cross_attn.", "blocks.{}.attn2.", WAN_ATTENTION),
    implementation="https://github.com/Wan-Video/Wan2.1",
    readers="ComfyUI, pipe.load_lora_weights",
    prefix="diffusion_model.",
    separator=".",
    down="lora_A",
    up="lora_B",
    alpha=False,  # diffusers takes none outside the blocks
)
NAMINGS = {
    "UNet2DConditionModel": UNET,
    "SD3Transformer2DModel": SD3,
    "PixArtTransformer2DModel": PIXART,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "ChromaTransformer2DModel": CHROMA,
    "WanTransformer3DModel": WAN,
}


def naming_of(denoiser_class: str) -> Naming:
    """
    Raises:
        UserError: no naming is published for the class.
    """
    if denoiser_class not in NAMINGS:
        raise UserError(
            f"format=kohya: nobody has published names for the layers of a {denoiser_class}: use format=peft"
        )
    return NAMINGS[denoiser_class]
