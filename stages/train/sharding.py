"""The frozen base split over the processes of a run (FSDP2), for a base that fits no single GPU.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. Each process holds a share of each block's weights, and all
of them gather a block's weights while it runs. The adapter's weights stay whole in each process.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from stages.errors import UserError

ASKED, VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
LEFT_OUT = "launch without --use_fsdp"


def is_asked() -> bool:
    """Whether `accelerate launch` asks to split the base.

    Raises:
        UserError: it asks for another version, or there is one process.
    """
    if os.environ.get(ASKED, "false").lower() not in ("true", "1"):
        return False
    if (version := os.environ.get(VERSION)) != "2":
        raise UserError(f"--fsdp_version {version}: the base can be split by version 2 only: say --fsdp_version 2")
    if not torch.distributed.is_initialized():
        raise UserError(f"--use_fsdp: there is one process, and nothing to split: {LEFT_OUT}")
    return True


def shard(denoiser: nn.Module, device: str) -> None:
    """Split a frozen denoiser's blocks over all processes, each share on its process's device.

    Raises:
        UserError: its class does not name its blocks.
    """
    kinds = getattr(denoiser, "_no_split_modules", None) or []
    blocks = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise UserError(f"--use_fsdp: {type(denoiser).__name__} does not name the blocks to split it by: {LEFT_OUT}")
    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    for block in reversed(blocks):  # a block within a block comes first
        fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)


def is_split(denoiser: nn.Module) -> bool:
    """Whether the processes gather its weights together, so that all of them must run the same number of passes."""
    return isinstance(denoiser, FSDPModule)


def most_passes(own: int, device: torch.device) -> int:
    """The number of passes of the process that needs most of them, where this one needs `own`."""
    passes = torch.tensor(own, device=device)
    torch.distributed.all_reduce(passes, torch.distributed.ReduceOp.MAX)
    return int(passes)
