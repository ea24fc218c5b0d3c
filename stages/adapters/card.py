"""The model card: Markdown for readers and a header for model hubs, made from an adapter's metadata."""

from __future__ import annotations

import json
from typing import Any

import diffusers
from huggingface_hub import EvalResult, ModelCardData

from stages.adapters.metadata import AdapterMetadata, Base
from stages.base.places import PACKAGE, is_on_hub, is_shipped, map_strings, public, short_name, whereabouts
from stages.base.size import DEFAULT_SIZE, size_name

CARD = """---
{header}
---

# One-pass guidance for {base}

An adapter that folds classifier-free guidance into one forward pass (adapter guidance distillation, arXiv 2503.07274).
The base stays frozen; the guidance scale is an input. `stages` is part of the Python package `{package}`.

```python
{loading}
GuidanceAdapter.from_pretrained("this folder, or its name on the hub").attach(pipe)
```

| | |
| --- | --- |
{facts}
"""
MEASURED = """
## Measured

{size}| method | guidance scale | effective scale | Frechet distance | gap closed | evaluations per image |
| --- | --- | --- | --- | --- | --- |
{rows}

Effective scale: the scale of two-pass guidance whose samples are nearest, from 1 (no guidance) to the highest in this
table.
"""
DIAL = """
## Strength of the file exported at guidance scale {scale}

At another strength, samples are nearest to those of two-pass guidance at the scale shown.

| strength | guidance scale |
| --- | --- |
{rows}
"""


def model_card(variant: str, parameters: int, metadata: AdapterMetadata) -> str:
    """Return the card's text.

    Args:
        parameters: the adapter's number of parameters.
    """
    low, high = metadata.scale_range
    facts = {
        **teacher_of(metadata),
        "variant": variant,
        "trained scales": f"{low:g} to {high:g}",
        "parameters": f"{parameters:,}",
    }
    if metadata.guidance_gain > 1:
        facts["guidance gain"] = (
            f"the adapter gets {metadata.guidance_gain:.3f} times the requested guidance, up to scale {high:g}"
        )
    if training := metadata.training:
        facts |= selected(metadata) | {
            "steps": f"{training['steps']:,}",
            "validation loss": f"{training['validation_loss']:.5f} (the base without guidance: "
            f"{training['validation_loss_unguided']:.5f})",
        }
    rows = metadata.evaluation
    card = CARD.format(
        header=header(variant, metadata, rows),
        base=short_name(metadata.base.pretrained_model_name_or_path),
        package=PACKAGE,
        loading=loading(metadata),
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
    )
    card += MEASURED.format(size=size_of(rows[0]), rows="\n".join(map(measured, rows))) if rows else ""
    return card + "".join(DIAL.format(scale=scale, rows=dial(rows)) for scale, rows in metadata.dial.items())


def selected(metadata: AdapterMetadata) -> dict[str, str]:
    """Return rows on the records: those trained on and held out, and their sizes; of an older folder, the dataset's."""
    training, arguments = metadata.training, metadata.arguments

    def told(counts: dict[str, int]) -> str:
        return f"{counts['records']:,} records of {counts['trajectories']:,} {training['kind']} trajectories"

    if "trained" not in training:
        return {"dataset": told(training)}
    own = size_name(arguments) if {"width", "height"} <= arguments.keys() else "the pipeline's own"
    sizes = [f"{own if name == DEFAULT_SIZE else name}, latents {shape}" for name, shape in training["sizes"].items()]
    return {
        "trained on": told(training["trained"]),
        "held out": told(training["held_out"]),
        "width x height x frames": "; ".join(sizes),
    }


def teacher_of(metadata: AdapterMetadata) -> dict[str, str]:
    """Return rows on the recorded pipeline: its class, guidance, scheduler and call arguments."""
    teacher = metadata.teacher
    facts = {
        "base": whereabouts(metadata.base.pretrained_model_name_or_path) if metadata.base != Base() else "",
        "teacher": metadata.base.pipeline_class,
        "guidance rule": as_code(metadata.guidance_rule),
        "guider": as_code(teacher.guider),
        "scheduler": teacher.scheduler_class,
        "scheduler configuration": as_code(teacher.scheduler_config),
        "call arguments": as_code(metadata.arguments),
    }
    return {name: value for name, value in facts.items() if value}


def as_code(values: dict[str, Any] | None) -> str:
    """Return JSON for a table cell; nothing for an empty value."""
    return f"`{json.dumps(map_strings(values, public), default=str)}`".replace("|", "\\|") if values else ""


def loading(metadata: AdapterMetadata) -> str:
    """Return Python that loads the recorded pipeline from stock classes."""
    base, teacher = metadata.base, metadata.teacher
    kind = base.pipeline_class
    if teacher.guider or not hasattr(diffusers, str(kind)):
        kind = "DiffusionPipeline"
    scheduler = teacher.scheduler_class
    source = "".join(f", {key}={value!r}" for key in ("revision", "variant") if (value := getattr(base, key)))
    name = base.pretrained_model_name_or_path
    shipped = is_shipped(name)
    place = f'resolve("{public(name)}")' if shipped else f'"{short_name(name)}"'
    lines = [
        f"from diffusers import {', '.join(filter(None, (scheduler, kind)))}",
        "from stages.adapters import GuidanceAdapter",
        *(["from stages.base.loading import resolve"] if shipped else []),
        "",
        f"pipe = {kind}.from_pretrained({place}{source})",
    ]
    if scheduler:
        lines.append(f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)")
    return "\n".join(lines)


def header(variant: str, metadata: AdapterMetadata, rows: list[dict[str, Any]]) -> str:
    """Return the YAML header: the base, the relation to it, and measured results.

    A hub refuses a card whose base is a folder, so such a base is not in the header.
    """
    base = metadata.base.pretrained_model_name_or_path
    on_hub = is_on_hub(base)
    results = [
        EvalResult(
            task_type="image-generation",
            dataset_type="reference",
            dataset_name="reference images",
            metric_type=metric,
            metric_name=f"{metric} of one pass at guidance scale {row['guidance_scale']:g}",
            metric_value=row[metric],
        )
        for row in rows
        if row["method"] == "one_pass"
        for metric in ("frechet_distance", "gap_closed")
        if row[metric] is not None
    ]
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="diffusers",
        tags=["guidance-distillation", "classifier-free-guidance", variant],
        model_name=f"one-pass guidance, {variant}",
        eval_results=results or None,
    )
    return data.to_yaml()


def size_of(row: dict[str, Any]) -> str:
    """How many images the figures are of; nothing of an evaluation that did not write it down."""
    if "num_samples" not in row:
        return ""
    return f"{row['num_samples']:,} images a row, {row['num_inference_steps']} steps, the same noise in every row.\n\n"


def measured(row: dict[str, Any]) -> str:
    effective = f"{row['effective_scale']:.2f}" if "effective_scale" in row else ""
    cells = [row["method"], f"{row['guidance_scale']:g}", effective, f"{row['frechet_distance']:.1f}"]
    gap = "none" if row["gap_closed"] is None else f"{row['gap_closed']:.3f}"
    return f"| {' | '.join(cells)} | {gap} | {row['denoiser_evaluations']:g} |"


def dial(rows: list[dict[str, float]]) -> str:
    return "\n".join(f"| {row['strength']:g} | {row['guidance_scale']:.2f} |" for row in rows)
