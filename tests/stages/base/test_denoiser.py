from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.base.denoiser import bind_inputs, denoiser_of, fingerprint, flatten, latent_name, unflatten
from stages.errors import UserError
from tests.conftest import tiny_dit


def test_the_denoiser_is_found_and_its_inputs_bound() -> None:
    name, denoiser = denoiser_of(tiny_dit())
    assert name == "transformer"
    assert latent_name(denoiser) == "hidden_states"
    latent = torch.zeros(1)
    assert bind_inputs(denoiser, (latent,), {"timestep": 3}) == {"hidden_states": latent, "timestep": 3}
    with pytest.raises(UserError, match="neither"):
        denoiser_of(nn.Identity())


def test_a_fingerprint_depends_on_every_weight_name_and_dtype() -> None:
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


def test_nested_arguments_have_dotted_names() -> None:
    nested = {"a": {"b": 1, "c": {"d": [2]}}, "e": 3}
    assert flatten(nested | {"none": None, "empty": {}}) == {"a.b": 1, "a.c.d": [2], "e": 3}
    assert unflatten(flatten(nested)) == nested
