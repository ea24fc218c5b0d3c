"""The card of a dataset: Markdown for readers and a header for the hub, with pictures of its histograms."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote
from typing import Any

from huggingface_hub import DatasetCardData

from stages.adapters.folder import CARD_FILE
from stages.base.places import PACKAGE, is_on_hub, is_shipped, short_name, whereabouts
from stages.publish.histograms import plot
from stages.publish.licence import licence_of
from stages.records.schema import DatasetInfo
from stages.records.verification import Survey

PICTURES = "card"
TAGS = ["webdataset", "guidance-distillation", "classifier-free-guidance", "diffusers"]
CARD = """{header}
# Guided trajectories of {teacher}

Records of a diffusion model that was sampled with classifier-free guidance: latents, timesteps, conditions, scales and
the guided predictions. They train adapters that fold both passes of guidance into one (adapter guidance distillation,
arXiv 2503.07274).

| | |
| --- | --- |
{facts}

{pictures}

## Tensors

A sample is one trajectory, or a part of one: `KEY.safetensors` and `KEY.json`, which holds `scale`, `condition` and
`seed`. For k steps, these tensors have the shape `[k, ...]`, but those named `cond.NAME`, which are the same at each
step. Token embeddings may have another length from sample to sample.

| tensor | dtype | shape of one record |
| --- | --- | --- |
{tensors}

## Read it

With stock webdataset:

```python
import json
from pathlib import Path

import safetensors.torch
import webdataset
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo_id}", repo_type="dataset", allow_patterns="shards/*")
shards = sorted(str(path) for path in Path(folder, "shards").glob("*.tar"))
for sample in webdataset.WebDataset(shards, shardshuffle=False):
    tensors = safetensors.torch.load(sample["safetensors"])
    scale = json.loads(sample["json"])["scale"]
    print(scale, tensors["timestep"].tolist(), tensors["latent"].shape, tensors["target"].shape)
```

With `datasets`, which gives the tensors as bytes:

```python
import safetensors.torch
from datasets import load_dataset

shards = "hf://datasets/{repo_id}/shards/*.tar"
for row in load_dataset("webdataset", data_files=shards, split="train", streaming=True):
    tensors = safetensors.torch.load(row["safetensors"])
    scale = row["json"]["scale"]
    print(scale, tensors["timestep"].tolist(), tensors["latent"].shape, tensors["target"].shape)
```

To train an adapter, with the Python package `{package}`, which made the dataset{needed}:

```bash
python -m pipeline.train data_dir=hf://datasets/{repo_id} output_dir=runs/adapter{base}
```
"""


def card_of(found: Survey, repo_id: str, license: str | None) -> dict[str, bytes]:
    """Return the card and its pictures by their names in the repository."""
    shown = {name: histogram for name, histogram in found.summary()["histograms"].items() if histogram}
    pictures = {f"{PICTURES}/{name}.png": plot(name, histogram) for name, histogram in shown.items()}
    teacher = found.info.teacher.pretrained_model_name_or_path
    known = is_on_hub(teacher) or is_shipped(teacher)
    text = CARD.format(
        header=header_of(found, license),
        teacher=short_name(teacher),
        package=PACKAGE,
        needed="" if known else ", and the teacher's weights",
        base="" if known else f" pretrained_model_name_or_path={quote(short_name(teacher))}",
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(found).items()),
        pictures="\n".join(f"![histogram of {name}]({PICTURES}/{name}.png)" for name in shown),
        tensors="\n".join(_tensors(found.info)),
        repo_id=repo_id,
    )
    return {CARD_FILE: text.encode()} | pictures


def header_of(found: Survey, license: str | None) -> str:
    """Return the card's header in YAML, between its marks."""
    plan, frames = found.info.published[-1], len(found.info.tensors["latent"].shape) > 3
    prompted = "text-to-video" if frames else "text-to-image"
    data = DatasetCardData(
        license=license,
        tags=TAGS,
        task_categories=[prompted if plan.conditions.prompts else "unconditional-image-generation"],
        size_categories=_size_category(plan.counts.samples),
        configs=[{"config_name": "default", "data_files": "shards/*.tar"}],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _tensors(info: DatasetInfo) -> Iterator[str]:
    """Rows on all tensors, with the shapes that they have at the dataset's sizes."""
    for name, spec in sorted(info.tensors.items()):
        shapes = dict.fromkeys(f"`{size.tensors[name].shape}`" for size in info.sizes.values())
        yield f"| `{name}` | {spec.dtype} | {', '.join(shapes)} |"


def _size_category(count: int) -> str:
    for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if count < limit:
            return name
    return "n>1M"


def _facts(found: Survey) -> dict[str, Any]:
    teacher, plan = found.info.teacher, found.info.published[-1]
    licence = licence_of(teacher.pretrained_model_name_or_path, teacher.revision)
    # The plan's own numbers are of the whole list of prompts or classes, of which the first may have sufficed.
    conditions = {
        "classes": _different(found, "class_label"),
        "prompts": _different(found, "prompt"),
    }
    low, high = plan.guidance.scale_range
    counts = plan.counts
    return {
        "teacher": whereabouts(teacher.pretrained_model_name_or_path),
        "pipeline": teacher.pipeline_class,
        "licence of the teacher's weights": licence or "unknown: the model's card states none",
        "scheduler": teacher.scheduler_class,
        "guidance scales": f"{low:g} to {high:g}",
        **{name: f"{number:,}" for name, number in conditions.items() if number},
        **({"negative prompts": "recorded"} if plan.conditions.negative_prompts else {}),
        "trajectories": f"{counts.trajectories:,}",
        "records": f"{counts.records:,}",
        "shards": f"{counts.units:,}, {counts.bytes:,} bytes",
        "fingerprint": f"`{plan.fingerprint}`",
    }


def _different(found: Survey, column: str) -> int:
    """The number of different values in a column of the manifest."""
    rows = (row for unit in found.units for row in found.commits[unit].samples)
    return len({row[column] for row in rows} - {None})
