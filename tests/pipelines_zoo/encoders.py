"""Tiny encoders of texts and pictures with random weights, made from configurations.

They complement those of `tests/support/families.py`.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.support.families import WIDTH, clip, lively, trained

CHAT = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}
{%- else %}{% for part in message['content'] -%}
{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


DESCRIBE = (  # the template that many pipelines put before a prompt; they count its tokens
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:\nuser\nassistant\n"
)


EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate. Picture 1:"
)


SECTIONS = {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 10000.0}


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}


def bytes_tokenizer(*texts: str, start: bool = False) -> Any:
    """Make a tokenizer that reads every text, with bytes for unknown words, and has Qwen's chat template.

    The words of `texts` become tokens too, so that long ones stay short. With `start` it puts a token before every
    text, so that none is empty.
    """
    tokenizer = copy.deepcopy(_bytes_tokenizer(texts))
    if start:
        token = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token[0]} $A", special_tokens=[token])
    return tokenizer


def language_model_sizes(tokenizer: Any) -> dict[str, Any]:
    """Return the sizes of a decoder of two layers for use as a text encoder."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def language_model(model: Any, config: Any, tokenizer: Any, **changes: Any) -> dict[str, Any]:
    sizes = language_model_sizes(tokenizer)
    return {"tokenizer": tokenizer, "text_encoder": lively(model(config(**sizes | changes)))}


def gemma2(**changes: Any) -> dict[str, Any]:
    return language_model(
        Gemma2Model, Gemma2Config, bytes_tokenizer(start=True), attn_implementation="eager", **changes
    )


def glm(**changes: Any) -> dict[str, Any]:
    return language_model(GlmModel, GlmConfig, bytes_tokenizer(start=True), **changes)


def qwen3(causal: bool = False, **changes: Any) -> dict[str, Any]:
    return language_model(Qwen3ForCausalLM if causal else Qwen3Model, Qwen3Config, bytes_tokenizer(), **changes)


def gemma3() -> dict[str, Any]:
    tokenizer = bytes_tokenizer(start=True)
    text = language_model_sizes(tokenizer) | {"query_pre_attn_scalar": WIDTH // 2}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4}, mm_tokens_per_image=4
    )
    return {"tokenizer": tokenizer, "text_encoder": lively(Gemma3ForConditionalGeneration(config))}


def qwen2_5_vl_text(tokenizer: Any, **changes: Any) -> Qwen2_5_VLTextConfig:
    sizes = language_model_sizes(tokenizer) | {"rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default"}}
    sizes.pop("head_dim")
    return Qwen2_5_VLTextConfig(**sizes | changes)


def qwen2_5_vl(*texts: str, processor: bool = False) -> dict[str, Any]:
    """Make a model and, if the pipeline has one, a processor of pictures with few patches."""
    tokenizer = bytes_tokenizer(EDIT, *texts)
    text = qwen2_5_vl_text(tokenizer).to_dict()
    config = Qwen2_5_VLConfig(text_config=text, vision_config=VISION, **vision_tokens(tokenizer))
    parts = {"tokenizer": tokenizer, "text_encoder": lively(Qwen2_5_VLForConditionalGeneration(config))}
    return parts | ({"processor": picture_processor(tokenizer)} if processor else {})


def clip_vision(width: int = 8, size: int = 32, patch: int = 8) -> dict[str, Any]:
    """Make an encoder of images `[size, size]` into `(size / patch)^2 + 1` tokens."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
    )
    return {
        "image_encoder": lively(CLIPVisionModelWithProjection(config)),
        "image_processor": CLIPImageProcessor(crop_size=size, size=size),
    }


def two_clips() -> dict[str, Any]:
    """Make two encoders and tokenizers, the second with a pooled embedding, as in Stable Diffusion XL."""
    one, two = clip(), clip(projection=True)
    return {**one, "tokenizer_2": two["tokenizer"], "text_encoder_2": two["text_encoder"]}


def bert(length: int = 77) -> dict[str, Any]:
    tokenizer = trained(BertTokenizer, 60)
    tokenizer.model_max_length = length
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
    )
    return {"tokenizer": tokenizer, "text_encoder": lively(BertModel(config))}


@functools.cache
def _bytes_tokenizer(texts: tuple[str, ...]) -> Any:
    tokenizer = trained(Qwen2Tokenizer, 2000, " ".join([DESCRIBE, *texts]))
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma(**changes: Any) -> dict[str, Any]:
    return language_model(GemmaForCausalLM, GemmaConfig, bytes_tokenizer(start=True), **changes)


def vision_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the token ids that mark pictures in a configuration."""
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()}


def qwen3_vl(model: Any = Qwen3VLForConditionalGeneration, layers: int = 2, **vision: Any) -> dict[str, Any]:
    tokenizer = bytes_tokenizer()
    text = language_model_sizes(tokenizer) | {"rope_parameters": SECTIONS, "num_hidden_layers": layers}
    seen = VISION | {"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]} | vision
    config = Qwen3VLConfig(text_config=text, vision_config=seen, **vision_tokens(tokenizer))
    return {"tokenizer": tokenizer, "text_encoder": lively(model(config)), "processor": picture_processor(tokenizer)}


class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """A processor without videos, which need another library."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def picture_processor(tokenizer: Any) -> Any:
    """Make a processor that turns every picture into 2x2 tokens."""
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    return PictureProcessor(Qwen2VLImageProcessor(size=pixels), tokenizer, chat_template=CHAT)


def mistral3() -> dict[str, Any]:
    tokenizer = bytes_tokenizer(SYSTEM_MESSAGE)
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Mistral3Config(
        text_config=language_model_sizes(tokenizer) | {"model_type": "mistral", "sliding_window": None},
        vision_config=vision | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    return {"tokenizer": tokenizer, "text_encoder": lively(Mistral3ForConditionalGeneration(config))}
