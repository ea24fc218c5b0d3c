"""The frozen base's linear layers with quantised weights: by torchao in 8 or 4 bits, by bitsandbytes in nf4."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.errors import UserError

LIBRARIES = {"int8": "torchao", "int4": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
INT4_GROUP = 64  # weights that share a scale and a zero point
INT4_CAPABILITY = (8, 0)  # of the GPUs that have torch's kernel for 4-bit weights


def check_quantization(kind: str, device: str, dtype: torch.dtype) -> None:
    """Check that this machine can hold the base so, before the base is loaded.

    Args:
        dtype: in which the base computes.

    Raises:
        UserError: the library is not installed, or the kind needs a GPU or another precision.
    """
    if kind == "none":
        return
    library = LIBRARIES[kind]
    if importlib.util.find_spec(library) is None:
        raise UserError(f"quantization={kind}: {library} is not installed: pip install '.[quantization]'")
    if kind != "int4":
        return
    if not device.startswith("cuda") or torch.cuda.get_device_capability(device) < INT4_CAPABILITY:
        raise UserError("quantization=int4: needs a GPU of compute capability 8.0 or newer: use nf4")
    if dtype is not torch.bfloat16:
        raise UserError("quantization=int4: computes in bf16 alone: add mixed_precision=bf16, or use nf4")


def quantize(denoiser: nn.Module, kind: str, device: str = "cpu") -> None:
    """Hold the weights of the linear layers in 8 or in 4 bits; each layer is moved to the device first."""
    if kind == "none":
        return
    if kind == "nf4":
        replace_linears(denoiser, lambda linear: as_nf4(linear, device))
        return
    from torchao.quantization import quantize_

    quantize_(denoiser, torchao_config(kind), device=None if device == "cpu" else device)
    if kind == "int4":
        replace_linears(denoiser, WithoutDerivative.of)


def torchao_config(kind: str) -> Any:
    from torchao import quantization

    if kind == "int8":
        return quantization.Int8WeightOnlyConfig()
    if kind == "fp8":
        return quantization.Float8WeightOnlyConfig()
    return quantization.Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d")


def replace_linears(denoiser: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace each linear layer, but none of its subclasses, which may hold their weights in their own way."""
    for parent in list(denoiser.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, replacement(child))


def as_nf4(linear: nn.Linear, device: str) -> nn.Module:
    """Return the layer with its weight in bitsandbytes' nf4, which also quantises the scales."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, bias = linear.weight.detach().to(device).contiguous(), linear.bias
    with torch.device("meta"):
        layer: Any = Linear4bit(linear.in_features, linear.out_features, bias is not None, weight.dtype)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    layer.weight = Params4bit(packed, False, state, state.blocksize, quant_type="nf4", module=layer, bnb_quantized=True)
    layer.quant_state = state
    layer.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
    # Else a pass without gradients would repack the weights for a CPU's kernel that has no derivative.
    layer.support_avx512bf16_for_cpu = False
    return layer.eval()


class WithoutDerivative(nn.Linear):
    """A frozen linear layer whose kernel has no derivative, such as torchao's in 4 bits."""

    @classmethod
    def of(cls, linear: nn.Linear) -> nn.Linear:
        """Change the class of a quantised layer; the groups of some others do not fit, and they stay plain."""
        if type(linear.weight.data) is not Tensor:
            linear.__class__ = cls
        return linear

    def forward(self, input: Tensor) -> Tensor:
        output = ProductWithFrozen.apply(input, self.weight)
        return output if self.bias is None else output + self.bias


class ProductWithFrozen(torch.autograd.Function):
    """`input @ weight.T`, with the weight's own values for the derivative: its product with the identity."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.width = weight, input.shape[-1]
        return functional.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        identity = torch.eye(ctx.width, dtype=gradient.dtype, device=gradient.device)
        return functional.linear(gradient, functional.linear(identity, ctx.weight)), None
