"""Named activations with their exact derivatives, for operators that write their own backward.

`forward(pre)` returns act(pre). `backward(grad, pre)` returns grad * act'(pre). Neither changes its inputs.
Both write to `out`, if given: any tensor of that shape and dtype, `grad` and `pre` included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.core.errors import ConfigError

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An elementwise function; `forward` is plain differentiable PyTorch, `backward` the fused derivative."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]


def _forward(
    function: Callable[..., Tensor], op: Callable[..., Tensor], **options: Any
) -> Callable[..., Tensor]:
    """The function; its operator, which public functions mostly hide, where there is an `out`."""

    def forward(pre: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return function(pre, **options)
        if pre.is_contiguous() and not out.is_contiguous():  # PyTorch's gelu through oneDNN loses its result
            return out.copy_(function(pre, **options))
        return op(pre, **options, out=out)

    return forward


def _backward(
    op: Callable[..., Tensor],
    *values: Any,
    kept: Callable[[Tensor], Tensor] = lambda pre: pre,
    **options: Any,
) -> Callable[..., Tensor]:
    """A fused derivative, which takes the gradient and what it `kept` of the forward pass."""

    def backward(grad: Tensor, pre: Tensor, out: Tensor | None = None) -> Tensor:
        into = {} if out is None else {"grad_input": out}
        return op(grad, kept(pre), *values, **options, **into)

    return backward


def _copy(source: Tensor, out: Tensor | None) -> Tensor:
    return source.clone() if out is None else out.copy_(source)


def _square_relu(pre: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.square(torch.relu(pre), out=out)


def _square_relu_backward(grad: Tensor, pre: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(torch.relu(pre).mul_(2), grad, out=out)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(
        forward=_forward(F.gelu, _aten.gelu),
        backward=_backward(_aten.gelu_backward),
    ),
    "gelu_tanh": Activation(
        forward=_forward(F.gelu, _aten.gelu, approximate="tanh"),
        backward=_backward(_aten.gelu_backward, approximate="tanh"),
    ),
    "identity": Activation(
        forward=lambda pre, out=None: _copy(pre, out),
        backward=lambda grad, pre, out=None: _copy(grad, out),
    ),
    "relu": Activation(
        forward=_forward(torch.relu, _aten.relu),
        backward=_backward(_aten.threshold_backward, 0),
    ),
    "sigmoid": Activation(
        forward=_forward(torch.sigmoid, _aten.sigmoid),
        backward=_backward(_aten.sigmoid_backward, kept=torch.sigmoid),
    ),
    "silu": Activation(
        forward=_forward(F.silu, _aten.silu),
        backward=_backward(_aten.silu_backward),
    ),
    "squared_relu": Activation(
        forward=_square_relu,
        backward=_square_relu_backward,
    ),
    "tanh": Activation(
        forward=_forward(torch.tanh, _aten.tanh),
        backward=_backward(_aten.tanh_backward, kept=torch.tanh),
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


def hidden_forward(act: Activation, pre: Tensor, gated: bool, out: Tensor | None = None) -> Tensor:
    """act(pre), or act(gate) * up for a pre-activation of (n, 2F)."""
    if not gated:
        return act.forward(pre, out=out)
    gate, up = pre.chunk(2, dim=1)
    return act.forward(gate, out=out).mul_(up)


def hidden_backward(
    act: Activation, grad: Tensor, pre: Tensor, gated: bool, out: Tensor | None = None
) -> Tensor:
    """The gradient of `pre` from that of its hidden_forward."""
    if not gated:
        return act.backward(grad, pre, out=out)
    gate, up = pre.chunk(2, dim=1)
    d_pre = torch.empty_like(pre) if out is None else out
    d_gate, d_up = d_pre.chunk(2, dim=1)
    act.forward(gate, out=d_up).mul_(grad)
    torch.mul(grad, up, out=d_gate)
    act.backward(d_gate, gate, out=d_gate)
    return d_pre
