"""The model card of an adapter."""

from __future__ import annotations

from typing import Any

import yaml

from stages.adapters import GuidanceAdapter
from stages.records.dataset import Dataset

CARD = """---
{header}---

# One-pass guidance for {base}

An adapter that folds classifier-free guidance into one forward pass (adapter guidance distillation, arXiv 2503.07274).
The base is frozen and stays as it is; the guidance scale is an input.

```python
from diffusers import DiffusionPipeline
from stages.adapters import GuidanceAdapter

pipe = DiffusionPipeline.from_pretrained("{base}")
GuidanceAdapter.from_pretrained("this folder").attach(pipe)
```

| | |
| --- | --- |
| variant | {variant} |
| trained scales | {low:g} to {high:g} |
| parameters | {parameters:,} ({share:.1%} of the base) |
| trained on | {records:,} records of {trajectories:,} guided trajectories |
| steps | {steps:,} |
| validation loss | {validation:.5f} (the base without guidance: {unguided:.5f}) |
"""


def model_card(adapter: GuidanceAdapter, dataset: Dataset, summary: dict[str, Any]) -> str:
    """Markdown with the header that model hubs read, from what training knows."""
    base = adapter.about["base"]["pretrained_model_name_or_path"]
    header = {
        "base_model": base,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "tags": ["guidance-distillation", "classifier-free-guidance", adapter.variant],
    }
    low, high = adapter.about["scale_range"]
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        base=base,
        variant=adapter.variant,
        low=low,
        high=high,
        parameters=summary["adapter_parameters"],
        share=summary["adapter_share"],
        records=dataset.info["counts"]["records"],
        trajectories=dataset.info["counts"]["trajectories"],
        steps=summary["steps"],
        validation=summary["validation_loss"],
        unguided=summary["validation_loss_unguided"],
    )
