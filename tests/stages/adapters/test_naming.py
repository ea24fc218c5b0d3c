"""Other tools' layer names, checked against the shapes of published weights."""

from __future__ import annotations

import pytest
import torch

from stages.adapters.layers import adaptable_layers
from stages.adapters.naming import NAMINGS, naming_of
from stages.errors import UserError
from tests.support.real_shapes import SHAPES, Shape, on_meta

NAMED = [shape for shape in SHAPES if type(on_meta(shape.config)).__name__ in NAMINGS]


@pytest.mark.parametrize("shape", NAMED, ids=lambda shape: shape.config)
def test_every_layer_has_a_unique_name(shape: Shape) -> None:
    denoiser, meta = on_meta(shape.config), torch.device("meta")
    naming, weights = naming_of(type(denoiser).__name__), {}
    for name, layer in adaptable_layers(denoiser).items():
        height, width, *kernel = layer.weight.shape
        one = [1] * len(kernel)
        weights[name] = torch.empty(1, width, *kernel, device=meta), torch.empty(height, 1, *one, device=meta)
    tensors = naming.renamed(weights)
    ranks = [len(tensor) for name, tensor in tensors.items() if name.endswith(f".{naming.down}.weight")]
    heights = [len(tensor) for name, tensor in tensors.items() if name.endswith(f".{naming.up}.weight")]
    assert sum(ranks) == len(weights)
    assert sum(heights) == sum(len(up) for _, up in weights.values())


def test_a_base_without_a_naming_is_refused() -> None:
    assert {shape.config for shape in SHAPES} - {shape.config for shape in NAMED} == {"dit_xl_2_256", "dit_xl_2_512"}
    with pytest.raises(
        UserError, match="format=kohya: nobody has published names for the layers of a DiTTransformer2D"
    ):
        naming_of("DiTTransformer2DModel")
