"""`lora` and `lora_fixed`: low-rank changes of the linear layers inside the sites (LoRA, arXiv 2106.09685).

`lora` turns each rank by scale, timestep and condition. `lora_fixed` knows one scale, so that it is a plain LoRA: it merges into
the base, and other tools load it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.adapters.adapter import GuidanceAdapter, Site
from stages.adapters.conditioning import Conditioning, Known
from stages.adapters.config import AdapterConfig
from stages.adapters.sites import Shape, find_projections
from stages.errors import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"  # where `load_lora_weights` looks


class LoRASite(Site):
    """`B (A x * g(c))` at a linear layer, with B zero at the start; without a hidden size, g is 1."""

    def __init__(self, width_in: int, width_out: int, rank: int, hidden_size: int | None) -> None:
        super().__init__()
        self.lora_A = nn.Linear(width_in, rank, bias=False)
        self.lora_B = nn.Linear(rank, width_out, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.gain = None if hidden_size is None else nn.Linear(hidden_size, rank)

    def of_step(self, known: Known) -> tuple[Tensor, ...]:
        return () if self.gain is None else (1 + self.gain(known.vector)[:, None],)

    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        low = self.lora_A(tokens)
        return self.lora_B(low * prepared[0] if prepared else low)


class LoRA(GuidanceAdapter):
    variant = "lora"
    default_sites = ("attention", "feed_forward")

    def new_site(self, width_in: int, width_out: int) -> Site:
        return LoRASite(width_in, width_out, self.rank, self.config.hidden_size)

    @classmethod
    def find(cls, denoiser: nn.Module, config: AdapterConfig, about: dict[str, Any]) -> dict[str, Shape]:
        return find_projections(denoiser, list(config.sites or []))


class LoRAFixed(LoRA):
    variant = "lora_fixed"
    default_conditions = ()

    def __init__(self, config: AdapterConfig, shapes: dict[str, Shape], about: dict[str, Any]) -> None:
        low, high = about["scale_range"]
        if low != high:
            raise UserError(
                f"adapter.variant=lora_fixed: learns one scale, the records have {low:g} to {high:g}: generate with "
                "guidance_scale=[2,2] (or another one), or train adapter.variant=lora"
            )
        if config.conditions:
            raise UserError("adapter.conditions: lora_fixed sees none: leave it out")
        super().__init__(config, shapes, about)

    def new_conditioning(self) -> Conditioning | None:
        return None

    def new_site(self, width_in: int, width_out: int) -> Site:
        return LoRASite(width_in, width_out, self.rank, None)

    def lora_weights(self) -> dict[str, Tensor]:
        """In peft's names: `down_blocks.0...to_q.lora_A.weight`."""
        return {
            f"{name}.{part}.weight": getattr(site, part).weight.detach().cpu().contiguous()
            for name, site in zip(self.shapes, self.sites.values(), strict=True)
            for part in ("lora_A", "lora_B")
        }

    def export_lora(self, save_directory: str | Path) -> Path:
        """Write the file that `pipe.load_lora_weights` and other tools load without this project.

        For a UNet the names are those of kohya's scripts, which every tool knows; for a transformer peft's.
        """
        path = Path(save_directory)
        path.mkdir(parents=True, exist_ok=True)
        subfolder = self.about["base"]["denoiser_subfolder"]
        weights = {f"{subfolder}.{name}": value for name, value in self.lora_weights().items()}
        if subfolder == "unet":
            weights = convert_state_dict_to_kohya(weights)
        save_file(weights, path / LORA_FILE, metadata={"format": "pt"})
        return path / LORA_FILE

    @torch.no_grad()
    def merge(self, denoiser: nn.Module) -> None:
        """Add it to the weights of a base for good, through peft: one pass then costs what no guidance costs."""
        from peft import LoraConfig, LoraModel  # slow to import, and needed only here

        self.check_fit(denoiser)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.shapes))
        model = LoraModel(denoiser, config, "guidance")
        for name, site in zip(self.shapes, self.sites.values(), strict=True):
            layer: Any = denoiser.get_submodule(name)
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)["guidance"].weight
                weight.copy_(getattr(site, part).weight)
        model.merge_and_unload()
