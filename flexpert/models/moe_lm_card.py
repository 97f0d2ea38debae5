"""The README.md that is saved beside a language model: what it is, and how to use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .moe_lm import MoELanguageForCausalLM

_TEMPLATE = """\
---
library_name: flexpert
pipeline_tag: text-generation
tags:
{tags}
---

# {title}

A Llama decoder{experts_title}, made by Flexpert.

| | |
|---|---|
| Vocabulary | {vocabulary} |
| Layers, width, heads | {layers}, {width}, {heads} |
| Longest sequence | {length} |
| Parameters | {parameters:,} |
| Parameters that a token meets | {active:,} |
{moe_rows}
## Use

```python
import flexpert.models  # makes the model known to transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder").eval()
ids = model.generate(prompt_ids, max_new_tokens=100)
```
"""

_MOE_ROWS = """\
| MoE layers | {places} |
| Experts per layer | {num_experts} of width {hidden_dim}, top-{top_k}, and {shared} shared |
| Router | {router} |
| Balance | {balance} |
"""


def language_card(model: MoELanguageForCausalLM) -> str:
    """The text of the card, in the form the Hugging Face hub reads."""
    config = model.config
    places = config.moe_layers()
    tags = ["text-generation", "llama", *(["mixture-of-experts"] if places else [])]
    moe_rows = ""
    if places:
        options = {"name": config.router} if isinstance(config.router, str) else config.router
        ways = ["selection bias (arXiv 2408.15664)"] if options.get("selection_bias") else []
        ways += (
            [f"{config.balance_loss} loss, weight {config.balance_weight}"] if config.balance_weight else []
        )
        moe_rows = _MOE_ROWS.format(
            places=", ".join(map(str, places)),
            num_experts=config.num_experts,
            hidden_dim=config.expert_hidden_dim,
            top_k=config.num_experts_per_tok,
            shared=config.num_shared_experts,
            router=", ".join(f"{name} {value}" for name, value in options.items()),
            balance=" and ".join(ways) or "none",
        )
    return _TEMPLATE.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        title="A mixture-of-experts language model" if places else "A language model",
        experts_title=" with mixture-of-experts layers (arXiv 2401.06066)" if places else "",
        vocabulary="256 bytes" if config.vocab_size == 256 else f"{config.vocab_size} tokens",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        length=config.max_position_embeddings,
        parameters=model.num_parameters(),
        active=model.num_active_parameters(),
        moe_rows=moe_rows,
    )
