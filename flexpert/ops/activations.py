"""Named activations with their exact derivatives, for operators that write their own backward.

`forward(pre)` returns act(pre). `backward(grad, pre)` returns grad * act'(pre). Neither changes its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.core.errors import ConfigError

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An elementwise function; `forward` is plain differentiable PyTorch, `backward` the fused derivative."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(
        forward=F.gelu,
        backward=_aten.gelu_backward,
    ),
    "gelu_tanh": Activation(
        forward=lambda pre: F.gelu(pre, approximate="tanh"),
        backward=lambda grad, pre: _aten.gelu_backward(grad, pre, approximate="tanh"),
    ),
    "identity": Activation(
        forward=lambda pre: pre.clone(),
        backward=lambda grad, pre: grad.clone(),
    ),
    "relu": Activation(
        forward=torch.relu,
        backward=lambda grad, pre: _aten.threshold_backward(grad, pre, 0),
    ),
    "sigmoid": Activation(
        forward=torch.sigmoid,
        backward=lambda grad, pre: _aten.sigmoid_backward(grad, torch.sigmoid(pre)),
    ),
    "silu": Activation(
        forward=F.silu,
        backward=_aten.silu_backward,
    ),
    "squared_relu": Activation(
        forward=lambda pre: torch.relu(pre).square(),
        backward=lambda grad, pre: torch.relu(pre).mul_(2).mul_(grad),
    ),
    "tanh": Activation(
        forward=torch.tanh,
        backward=lambda grad, pre: _aten.tanh_backward(grad, torch.tanh(pre)),
    ),
}


def get_activation(name: str) -> Activation:
    """The activation called `name`.

    Raises:
        ConfigError: the name is not in `ACTIVATIONS`; the message lists those that are.
    """
    try:
        return ACTIVATIONS[name]
    except KeyError:
        options = ", ".join(sorted(ACTIVATIONS))
        raise ConfigError(f"activation={name!r} is unknown; choose one of: {options}") from None
