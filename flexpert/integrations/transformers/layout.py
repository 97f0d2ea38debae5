"""What an experts module of `transformers` holds, and whether one fused operator computes it.

Its weights are stacked: `gate_up_proj` (E, 2F, D), or `up_proj` (E, F, D) without a gate, and `down_proj`
(E, D, F); transposed layouts swap the last two dimensions. Flags that the class was decorated with say which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.core.errors import ConfigError

FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")

_BY_TYPE: dict[str, str] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "squared_relu",
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "LinearActivation": "identity",
}
_BY_FUNCTION: dict[Callable[..., Tensor], str] = {F.silu: "silu", F.relu: "relu", torch.relu: "relu"}
_DEFAULT_GATE = ("transformers.integrations.moe", "_default_apply_gate")
_HOMES = ("transformers.activations", "torch.nn.modules.activation")


def activation_name(function: Any) -> str | None:
    """The activation of `flexpert.ops` that an `act_fn` is; None for one that has no name here."""
    kind = type(function)
    if isinstance(function, nn.Module):
        return _BY_TYPE.get(kind.__name__) if kind.__module__ in _HOMES else None
    return _BY_FUNCTION.get(function)


def is_experts(module: nn.Module) -> bool:
    """Whether a module's class was decorated for the experts interface."""
    return "is_concatenated" in module.__dict__ and hasattr(type(module), "_apply_gate")


def _has_own_gate(experts: Any) -> bool:
    """Whether the class has another rule than act(gate) * up."""
    gate = type(experts)._apply_gate
    return (gate.__module__, gate.__name__) != _DEFAULT_GATE


def first_name(experts: Any) -> str:
    """The name of the first layer's weight."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def fused_activation(experts: Any) -> str | None:
    """The activation with which `ops.grouped_mlp` computes such experts; None where it cannot.

    It cannot where weights are transposed, gate and up interleaved, results normalised, or where the gate
    or the activation is the model's own.
    """
    if experts.is_transposed or not experts.is_concatenated or experts.has_post_expert_norm:
        return None
    if experts.has_gate and _has_own_gate(experts):
        return None
    return activation_name(getattr(experts, "act_fn", None))


def check_layout(experts: Any, name: str) -> None:
    """Refuse weights that the flags of the module's class do not describe.

    Raises:
        ConfigError: with what was found and what can be done.
    """
    first = first_name(experts)
    wanted = [first, "down_proj"] + ([f"{first}_bias", "down_proj_bias"] if experts.has_bias else [])
    found = {own: getattr(experts, own, None) for own in wanted}
    shapes = {own: tuple(w.shape) for own, w in experts.named_parameters(recurse=False)}
    remedy = "keep experts_implementation='eager' for it"
    if missing := [own for own, tensor in found.items() if not isinstance(tensor, Tensor)]:
        raise ConfigError(
            f"{name} ({type(experts).__name__}) has no {', '.join(missing)}, which its class says it has; "
            f"its parameters are {shapes}: an unknown layout, so {remedy}"
        )
    w1, w2 = found[first], found["down_proj"]
    assert isinstance(w1, Tensor)
    assert isinstance(w2, Tensor)
    halves = 2 if experts.has_gate else 1
    if experts.is_transposed and w1.dim() == w2.dim() == 3:
        w1, w2 = w1.mT, w2.mT
    fits = w1.dim() == w2.dim() == 3 and w1.shape[0] == w2.shape[0] and w1.shape[1] == halves * w2.shape[2]
    if not fits:
        raise ConfigError(
            f"{name} ({type(experts).__name__}) has the weights {shapes}, which are not those of stacked "
            f"experts with has_gate={experts.has_gate}, is_transposed={experts.is_transposed}: an unknown "
            f"layout, so {remedy}"
        )
