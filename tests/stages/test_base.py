from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stages.base import (
    bind_inputs,
    choose_device,
    decode,
    denoiser_of,
    fingerprint,
    latent_name,
    load_pipeline,
    resolve_model,
    undecoded,
)
from stages.errors import UserError
from tests.conftest import tiny_dit


def test_models_are_found_here_below_the_project_or_on_a_hub(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model(str(tiny_teacher)) == str(tiny_teacher)
    assert Path(resolve_model("stages/embedded")).is_dir()
    assert resolve_model("someone/some-model") == "someone/some-model"


def test_what_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no diffusers pipeline could be loaded"):
        load_pipeline(str(tmp_path))


def test_the_denoiser_is_found_and_its_inputs_bound() -> None:
    name, denoiser = denoiser_of(tiny_dit())
    assert name == "transformer"
    assert latent_name(denoiser) == "hidden_states"
    latent = torch.zeros(1)
    assert bind_inputs(denoiser, (latent,), {"timestep": 3}) == {"hidden_states": latent, "timestep": 3}
    with pytest.raises(UserError, match="neither"):
        denoiser_of(nn.Identity())


def test_a_fingerprint_tells_every_weight_name_and_dtype() -> None:
    torch.manual_seed(0)
    one = nn.Linear(3, 3)
    same = nn.Linear(3, 3)
    same.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(same.half()) != fingerprint(one)
    with torch.no_grad():
        one.bias[0] += 1e-6
    assert fingerprint(one) != fingerprint(same.float())
    assert fingerprint(nn.Linear(3, 3).bfloat16())


def test_undecoded_keeps_the_latents_that_would_have_been_decoded() -> None:
    pipe = tiny_dit()
    images = pipe([1], 2.0, torch.Generator().manual_seed(0), 3, "pt").images
    with undecoded(pipe) as latents:
        pipe([1], 2.0, torch.Generator().manual_seed(0), 3, "pt")
    assert latents[0].shape == (1, 4, 8, 8)
    torch.testing.assert_close((decode(pipe, latents[0]) + 1) / 2, images)


def test_auto_is_a_gpu_where_there_is_one() -> None:
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match="device=abacus: not here"):
        choose_device("abacus")
