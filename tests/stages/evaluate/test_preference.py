from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.errors import UserError
from stages.evaluate.preference import PreferenceJudge, load_scores
from tests.stages.evaluate.test_clip_score import save_tiny_clip
from tests.support.families import PROMPTS

SCORES = """
import numpy as np
import torch

class Brightness(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0, device=device))

    def forward(self, pictures, prompts):
        light = torch.tensor([np.asarray(picture).mean() for picture in pictures])
        return self.weight * light + torch.tensor([len(prompt) for prompt in prompts])

def length(device):
    return lambda pictures, prompts: [len(prompt) for prompt in prompts]

def one_for_all(device):
    return lambda pictures, prompts: 3.0

def text(device):
    return lambda pictures, prompts: ["good"] * len(prompts)

def no_number(device):
    return lambda pictures, prompts: [float("nan")] * len(prompts)

def nothing(device):
    return None

def without_weights(device):
    raise OSError("no weights\\nfound")
"""
PAGE = Path(__file__).parents[3] / "stages" / "evaluate" / "README.md"
CONDITIONS = [{"prompt": "four"}, {"prompt": "seven"}]


def save_scores(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    (folder / f"{name}.py").write_text(SCORES)
    monkeypatch.syspath_prepend(folder)
    return name


def test_a_score_of_pictures_and_prompts_becomes_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = save_scores(tmp_path, monkeypatch, "scores_of_test")
    images = torch.stack([-torch.ones(1, 8, 8), torch.ones(1, 8, 8)])
    found = PreferenceJudge(f"{module}:Brightness", "cpu").measure(images, CONDITIONS)
    assert found.keys() == {"preference.Brightness"}
    assert found["preference.Brightness"].tolist() == [4, 2 * 255 + 5]
    assert PreferenceJudge(f"{module}:length", "cpu").measure(images, CONDITIONS)["preference.length"].tolist() == [
        4,
        5,
    ]


def test_the_fingerprint_follows_weights_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = save_scores(tmp_path, monkeypatch, "scores_with_weights")
    judge, plain = PreferenceJudge(f"{module}:Brightness", "cpu"), PreferenceJudge(f"{module}:length", "cpu")
    before, plain_before = judge.fingerprint, plain.fingerprint
    assert before == PreferenceJudge(f"{module}:Brightness", "cpu").fingerprint
    with torch.no_grad():
        judge.score.weight.fill_(3)  # type: ignore[attr-defined]
    assert judge.fingerprint != before
    (tmp_path / f"{module}.py").write_text(SCORES.replace("len(prompt)", "2 * len(prompt)"))
    assert plain.fingerprint != plain_before


def test_a_score_that_cannot_be_loaded_or_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = save_scores(tmp_path, monkeypatch, "scores_with_faults")
    (tmp_path / "scores_with_a_fault.py").write_text("def length(:")
    for entry, message in (
        ("PickScore", "name a class or function as MODULE:NAME"),
        ("no_such_module:PickScore", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{module}:PickScore", "cannot be loaded: .*has no attribute 'PickScore'"),
        (f"{module}:without_weights", "cannot be loaded: OSError: no weights: fix that"),
        (f"{module}:nothing", "nothing\\(device\\) returns no callable"),
        (f"{module}:SCORES", "cannot be loaded: .*has no attribute"),
        ("scores_with_a_fault:length", "cannot be loaded: SyntaxError: "),
    ):
        with pytest.raises(UserError, match=f"preference={entry}: {message}"):
            PreferenceJudge(entry, "cpu")
    for name, message in (("text", "fails: ValueError: "), ("no_number", "returns a number that is not finite")):
        with pytest.raises(UserError, match=f"preference={module}:{name}: {message}"):
            PreferenceJudge(f"{module}:{name}", "cpu").measure(torch.zeros(2, 1, 8, 8), CONDITIONS)
    with pytest.raises(UserError, match="preference: length is given twice: give each score a name of its own"):
        load_scores([f"{module}:length"] * 2, "cpu")
    with pytest.raises(UserError, match=r"returns numbers of shape \[\] for 2 images: return one number an image"):
        PreferenceJudge(f"{module}:one_for_all", "cpu").measure(torch.zeros(2, 3, 8, 8), CONDITIONS)


def test_the_pages_example_scores_by_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny CLIP in place of the published one: the scaled cosine of picture and prompt."""
    folder = save_tiny_clip(tmp_path / "clip")
    code = PAGE.read_text().split("```python\n")[1].split("```")[0]
    for published in ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        assert published in code
        code = code.replace(published, str(folder))
    (tmp_path / "scores_of_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    judge = PreferenceJudge("scores_of_page:PickScore", "cpu")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    conditions = [{"prompt": prompt} for prompt in PROMPTS[:2]]
    both = judge.measure(images, conditions)["preference.PickScore"]
    alone = judge.measure(images[1:], conditions[1:])["preference.PickScore"]
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
    assert both.abs().max() <= judge.score.model.logit_scale.exp() + 1e-3  # type: ignore[attr-defined]
    assert both.unique().numel() == 2
