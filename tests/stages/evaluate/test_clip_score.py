from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from stages.errors import UserError
from stages.evaluate.clip_score import ClipJudge
from stages.evaluate.feature_extractors import as_tensor
from tests.support.families import PROMPTS

IMAGES = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
CONDITIONS = [{"prompt": prompt} for prompt in PROMPTS]


def save_tiny_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer().train_new_from_iterator(PROMPTS, vocab_size=400)
    tokenizer.model_max_length = 16
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = small | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_the_score_is_the_cosine_of_image_and_prompt(tiny_clip: Path) -> None:
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)
    pixels = ((IMAGES + 1) * 127.5).round().byte()
    with torch.no_grad():
        given = processor(images=list(pixels), text=PROMPTS, return_tensors="pt", padding=True)
        image: Tensor = as_tensor(model.get_image_features(given["pixel_values"]))
        text: Tensor = as_tensor(model.get_text_features(given["input_ids"], given["attention_mask"]))
        cosine = functional.cosine_similarity(image, text)
        if cosine.max() <= 0:  # which words are which tokens differs from run to run, and so does the sign
            model.visual_projection.weight.neg_()
            model.save_pretrained(tiny_clip)
            cosine = -cosine
    found = ClipJudge(str(tiny_clip), "cpu").measure(IMAGES, CONDITIONS)["clip_score"]
    expected = (100 * cosine).clamp(min=0)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert found.max() > 0


def test_images_are_scored_one_by_one_and_may_be_grey(tiny_clip: Path) -> None:
    judge = ClipJudge(str(tiny_clip), "cpu")
    both = judge.measure(IMAGES, CONDITIONS)["clip_score"]
    torch.testing.assert_close(both[1:], judge.measure(IMAGES[1:], CONDITIONS[1:])["clip_score"])
    assert judge.measure(IMAGES[:, :1], CONDITIONS)["clip_score"].shape == (2,)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clip_model=.*no CLIP model with its processor found") as raised:
        ClipJudge(str(tmp_path), "cpu")
    assert "\n" not in str(raised.value)
