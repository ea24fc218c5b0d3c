"""Load exported files with stock tools, as a script that can import nothing of this project.

Reads from standard input a JSON list of jobs: `pipe` (a pipeline's folder), `arguments` of its call, `format`, `file`
(the export) and `expected` (a safetensors file with the images of the fused pipeline). Prints for each job in turn the
largest difference from the expected images, relative to their largest value.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.modules["stages"] = None  # type: ignore[assignment]


def images(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """Return the result of two unguided steps for two conditions, each from its own noise: latents if it has any."""
    scale = "true_cfg_scale" if "true_cfg_scale" in type(pipe).__call__.__annotations__ else "guidance_scale"
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    kind = "latent" if "prompt" in arguments else "np"
    with torch.no_grad():
        output = pipe(**arguments, generator=generators, num_inference_steps=2, output_type=kind, **{scale: 1.0})
    return torch.as_tensor(next(iter(output.values())))


def load(pipe: Any, format: str, file: Path) -> None:
    """Load as the last line printed by `pipeline.export` says."""
    if format == "peft":
        from peft import PeftModel

        PeftModel.from_pretrained(getattr(pipe, "unet", None) or pipe.transformer, file.parent)
    else:
        pipe.load_lora_weights(file if format == "kohya" else file.parent)


def difference(job: dict[str, Any]) -> float:
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    pipe = DiffusionPipeline.from_pretrained(job["pipe"])
    pipe.set_progress_bar_config(disable=True)
    load(pipe, job["format"], Path(job["file"]))
    expected = load_file(job["expected"])["images"]
    return float((images(pipe, job["arguments"]) - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    print(json.dumps([difference(job) for job in json.load(sys.stdin)]))
