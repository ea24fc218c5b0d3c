"""Export: adapter -> a LoRA at one guidance scale, which stock tools load without this project.

python -m pipeline.export adapter_dir=runs/mnist_sd guidance_scale=3 format=diffusers output=exported
python -m pipeline.export adapter_dir=runs/mnist_dit guidance_scale=3 format=peft output=exported dial_samples=64

With `dial_samples=`, the command measures the guidance scale of each strength of the LoRA. It writes them into the
file's metadata and into the adapter's model card: README.md and adapter_config.json in adapter_dir.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import MISSING

from pipeline.command import run
from stages.adapters import GuidanceAdapter
from stages.adapters.export import DIFFUSERS, FORMATS, KOHYA, export, how_to_load, prepared
from stages.adapters.folder import CARD_FILE, CONFIG_FILE, write_card
from stages.base.loading import choose_device
from stages.base.prompts import read_prompts
from stages.configuration.options import check_bounds, option
from stages.evaluate.comparisons import load_pair
from stages.evaluate.conditions import conditions_of
from stages.evaluate.dial import measure_dial
from stages.storage.files import check_folder


@dataclass
class ExportConfig:
    adapter_dir: str = option(MISSING, "folder of the adapter, on disk or in a bucket, or its hub id")
    guidance_scale: float = option(MISSING, "the scale to export", above=1)
    format: str = option(
        DIFFUSERS,
        "`diffusers` for pipe.load_lora_weights, `peft` for PeftModel.from_pretrained and servers, `kohya` for ComfyUI "
        "and trainers",
        one_of=FORMATS,
    )
    output: str = option(MISSING, "folder; for format=kohya a .safetensors file")
    dial_samples: int = option(
        0, "images per strength for measuring the guidance scale of each strength; 0: do not measure", at_least=0
    )
    prompts: str | None = option(None, "for the dial, if the pipeline takes prompts: a file with a column prompt")
    pretrained_model_name_or_path: str | None = option(
        None, "for the dial: the pipeline; by default the adapter's base"
    )
    num_inference_steps: int = option(25, "for the dial: denoising steps per image", at_least=1, at_most=1000)
    device: str = option("auto", "for the dial: `auto` (a GPU if there is one), `cuda` or `cpu`")


def main(config: ExportConfig) -> None:
    check_bounds(config)
    adapter = GuidanceAdapter.from_pretrained(config.adapter_dir)
    output = Path(config.output)
    prepared(adapter, output, config.guidance_scale, config.format)  # fails before anything is sampled
    check_folder(output.parent if config.format == KOHYA else output, "name another output")
    if config.dial_samples:
        adapter = with_dial(config)
    file = export(adapter, output, config.guidance_scale, config.format)
    print(f"{file}: {len(adapter.shapes)} layers at guidance scale {config.guidance_scale:g}")
    print(how_to_load(adapter, file, config.format))


def with_dial(config: ExportConfig) -> GuidanceAdapter:
    """Measure the adapter's dial at the exported scale, print it, and write it into the model card."""
    base = config.pretrained_model_name_or_path
    pipe, adapter = load_pair(config.adapter_dir, base, choose_device(config.device))
    rows = read_prompts(config.prompts) if config.prompts else conditions_of(type(pipe), adapter, None, [])
    dial = measure_dial(
        pipe, adapter, config.guidance_scale, rows, config.dial_samples, config.num_inference_steps
    )  # fmt: skip
    for row in dial:
        print(f"strength {row['strength']:g}: guidance scale {row['guidance_scale']:.2f}")
    dials = adapter.metadata.dial | {f"{config.guidance_scale:g}": dial}
    adapter.metadata = replace(adapter.metadata, dial=dials)
    folder = Path(config.adapter_dir)
    if folder.is_dir() and base is None:
        write_card(adapter, folder)
        print(f"model card: {folder / CARD_FILE} and {CONFIG_FILE} beside it now hold these strengths")
    return adapter.to("cpu")


if __name__ == "__main__":
    run(ExportConfig, main, __doc__)
