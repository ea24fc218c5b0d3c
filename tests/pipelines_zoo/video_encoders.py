"""Encoders of texts and pictures for pipelines of videos and sounds, beyond those of `encoders.py`."""

from __future__ import annotations

import re
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Gemma2Encoder,
    T5Gemma2EncoderConfig,
    T5Tokenizer,
)

from tests.pipelines_zoo.encoders import (
    CHAT,
    CHAT_TOKENS,
    clip_vision,
    language_model,
    language_model_sizes,
    qwen2_5_vl_text,
)
from tests.support.families import WIDTH, lively, trained


def chat_tokenizer(text: str = "") -> Any:
    """Make a tokenizer that reads every text, and puts a token before it.

    The words of `text` and its markers in angle brackets become tokens too, so that a long template stays short.
    """
    tokenizer = trained(Qwen2Tokenizer, 600, text)
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHAT_TOKENS, *re.findall("<[^<>]+>", text)]})
    tokenizer.chat_template = CHAT
    start = [("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start[0][0]} $A", special_tokens=start)
    return tokenizer


def llama(template: str) -> dict[str, Any]:
    return language_model(LlamaModel, LlamaConfig, chat_tokenizer(template), num_hidden_layers=4)


def qwen2_5_vl(text: str = "") -> dict[str, Any]:
    tokenizer = chat_tokenizer(text)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config=qwen2_5_vl_text(tokenizer).to_dict(), vision_config=vision)
    return {"tokenizer": tokenizer, "text_encoder": lively(Qwen2_5_VLForConditionalGeneration(config))}


def qwen2_vl() -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    text = language_model_sizes(tokenizer) | {"rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default"}}
    text.pop("head_dim")
    config = Qwen2VLConfig(
        text_config=text, vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": WIDTH}
    )
    return {"tokenizer": tokenizer, "text_encoder": lively(Qwen2VLForConditionalGeneration(config))}


def t5gemma2() -> dict[str, Any]:
    tokenizer = trained(T5Tokenizer, 60)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = T5Gemma2EncoderConfig(
        text_config=language_model_sizes(tokenizer) | {"dropout_rate": 0.0},
        vision_config=vision | {"image_size": 8, "patch_size": 4},
    )
    return {"tokenizer": tokenizer, "text_encoder": lively(T5Gemma2Encoder(config))}


def llava(template: str, patches: int) -> dict[str, Any]:
    """Make a model for a template with `<image>`, which stands for `patches` squared tokens."""
    tokenizer = chat_tokenizer(template)
    picture = clip_vision(patch=2, size=2 * patches)
    config = LlavaConfig(
        text_config=LlamaConfig(**language_model_sizes(tokenizer) | {"num_hidden_layers": 4, "vocab_size": 700}),
        vision_config=picture["image_encoder"].config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = lively(LlavaForConditionalGeneration(config))
    return {"tokenizer": tokenizer, "text_encoder": encoder, "image_processor": picture["image_processor"]}


def siglip_vision(width: int = 8, size: int = 32) -> dict[str, Any]:
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=8,
    )
    return {
        "image_encoder": lively(SiglipVisionModel(config)),
        "feature_extractor": SiglipImageProcessor(size={"height": size, "width": size}),
    }
