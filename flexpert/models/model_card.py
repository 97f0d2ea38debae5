"""The README.md that is saved beside a model: what it is, and how to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .swinv2_moe import SwinV2MoEForImageClassification

_TEMPLATE = """\
---
library_name: flexpert
pipeline_tag: image-classification
tags:
{tags}
---

# {title} for image classification

A Swin Transformer V2 (arXiv 2111.09883){experts_title}, made by Flexpert.

| | |
|---|---|
| Input | {channels} x {image_size} x {image_size} pixels, patches of {patch_size} |
| Classes | {num_labels} |
| Blocks per stage | {depths} |
| Width of the first stage | {embed_dim} |
| Parameters | {parameters:,} |
| Parameters that a token meets | {active:,} |
{moe_rows}
## Use

```python
import flexpert.models  # makes the model known to transformers
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("path/to/this/folder").eval()
logits = model(pixel_values=images).logits
```
{moe_use}
"""

_MOE_ROWS = """\
| MoE layers | {layers}: {places} |
| Experts per layer | {num_experts}, top-{top_k} |
| Router | {router} |
| Capacity factor | {capacity_factor} |
| Balance loss | {balance_loss}, weight {balance_weight} |
"""

_MOE_USE = """
Experts per token and capacity may be changed without retraining:

```python
from flexpert import RoutingContext, routing_scope

with routing_scope(model, context=RoutingContext(top_k=1, capacity_factor=0.5)):
    logits = model(pixel_values=images).logits
```
"""


def model_card(model: SwinV2MoEForImageClassification) -> str:
    """The text of the card, in the form the Hugging Face hub reads."""
    config = model.config
    places = config.moe_places()
    tags = ["image-classification", "vision", "swinv2", *(["mixture-of-experts"] if places else [])]
    moe_rows = ""
    if places:
        router = config.router if isinstance(config.router, str) else config.router["name"]
        capacity = "none (dropless)" if config.capacity_factor is None else config.capacity_factor
        moe_rows = _MOE_ROWS.format(
            layers=len(places),
            places=", ".join(f"stage {stage + 1} block {block}" for stage, block in places),
            num_experts=config.num_experts,
            top_k=config.top_k,
            router=router,
            capacity_factor=capacity,
            balance_loss=config.balance_loss,
            balance_weight=config.balance_weight,
        )
    return _TEMPLATE.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        title="SwinV2-MoE" if places else "SwinV2",
        experts_title=" with mixture-of-experts layers (arXiv 2206.03382)" if places else "",
        channels=config.num_channels,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_labels=config.num_labels,
        depths=", ".join(map(str, config.depths)),
        embed_dim=config.embed_dim,
        parameters=model.num_parameters(),
        active=model.num_active_parameters(),
        moe_rows=moe_rows,
        moe_use=_MOE_USE if places else "",
    )
