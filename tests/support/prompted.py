"""A small dataset with prompts."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import generate, generate_config
from tests.support.families import ARGUMENTS, PROMPTS, save


def prompted_dataset(folder: Path) -> Path:
    """Record a tiny Stable Diffusion 3, whose prompts have several lengths."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    teacher = save("stable_diffusion_3", folder / "teacher")
    config = generate_config(teacher, folder / "data", prompts=str(folder / "prompts.txt"))
    config.teacher.call = dict(ARGUMENTS["stable_diffusion_3"])
    return generate(config)
