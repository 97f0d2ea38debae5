"""The README.md that is saved beside a converted model: what it is, and how to load it."""

from __future__ import annotations

from torch import nn

from flexpert.core.config import MoEConfig

from .report import measure_model
from .structure import Structure

_TEMPLATE = """\
---
library_name: flexpert
tags:
- mixture-of-experts
---

# {model} with mixture-of-experts layers

Converted from a dense model by Flexpert: {params:,} parameters, of which a token meets {active:,}.

| MLP | method | experts | active | shared |
|---|---|---|---|---|
{rows}

## Use

```python
from flexpert.convert import load

model = load("path/to/this/folder"{more})
```

The `from_pretrained` of transformers would leave the experts out and draw dense MLPs at random.
"""


def _shared(config: MoEConfig) -> str:
    width = f" of {config.shared_hidden_dim}" if config.shared_hidden_dim else ""
    return f"{config.num_shared_experts}{width}"


def conversion_card(model: nn.Module, structure: Structure, *, built_from_config: bool) -> str:
    """The text of the card, in the form the Hugging Face hub reads."""
    sizes = measure_model(model)
    rows = [
        f"| {name} | {layer.method} | {layer.moe.num_experts} of {layer.moe.hidden_dim} | {layer.moe.top_k} "
        f"| {_shared(layer.moe)} |"
        for name, layer in structure.layers.items()
    ]
    return _TEMPLATE.format(
        model=type(model).__name__,
        params=sizes.params,
        active=sizes.active_params,
        rows="\n".join(rows),
        more="" if built_from_config else ", dense_model",
    )
