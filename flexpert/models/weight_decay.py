"""Which parameters of SwinV2-MoE are decayed: weight matrices, and nothing that plays another part."""

from __future__ import annotations

from typing import Any

from torch import nn

from flexpert.experts import MLPExperts, ModuleExperts, StackedModules
from flexpert.experts.pieces import VECTORS
from flexpert.routers import CosineRouter

# Parts of names: the network that makes position biases ("cpb_mlp" as published), tables of positions, and
# the learned temperature of SwinV2's attention.
_KEYWORDS = ("continuous_position_bias_mlp.", "position_embeddings", "logit_scale")


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that no optimiser should decay, as in the published code.

    They are: vectors and scalars (biases, norms); position biases and tables; temperatures; the experts'
    vectors, which are matrices (E, F) and (E, D) here; all of a cosine router (projector, expert embeddings,
    temperature).
    """
    names = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    names |= {name for name, _ in model.named_parameters() if any(word in name for word in _KEYWORDS)}
    for prefix, module in model.named_modules():
        if isinstance(module, CosineRouter):
            names |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
        elif isinstance(module, MLPExperts):
            names |= {f"{prefix}.{name}" for name, _ in module.named_parameters() if name in ("b1", "b2")}
        elif isinstance(module, StackedModules):  # (E, ...) of a vector
            names |= {f"{prefix}.{name}" for name, tensor in module.named_parameters() if tensor.ndim <= 2}
        elif isinstance(module, ModuleExperts):
            names |= {f"{prefix}.{n}" for n, _ in module.named_parameters() if n.startswith(f"{VECTORS}_")}
    return names


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW, with and without decay, that hold every trainable parameter once.

    Args:
        model: a SwinV2-MoE or its dense twin.
        weight_decay: of the first group; the second has 0. Published: 0.1.
    """
    exempt = no_weight_decay(model)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if name in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
