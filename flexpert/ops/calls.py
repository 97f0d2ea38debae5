"""How an operator is called: through autograd and the dispatcher only where somebody needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flexpert.core.errors import FlexpertError

from . import select
from .library import RULES
from .library_route import OPERATORS
from .watched import is_unwatched

_OPERATORS = {
    name: getattr(OPERATORS, name).default
    for name in (
        "assign", "gather_rows", "grouped_linear", "grouped_mlp", "grouped_mlp_packed", "route",
        "router_logits", "scatter_combine",
    )
}  # fmt: skip


def call(name: str, *args: Any) -> Any:
    """The operator of that name; where nobody watches, without the detour through autograd's Python.

    Nor through the dispatcher: decoding waits for every microsecond, and it takes ten.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(name, args)
    operator = _OPERATORS[name]
    if torch.compiler.is_compiling():
        return operator(*args)
    differentiates = torch.is_grad_enabled() and any(
        isinstance(arg, Tensor) and arg.requires_grad for arg in args
    )
    if is_unwatched(args):
        if differentiates:
            return _FUNCTIONS[name].apply(*args)
        return select.kernel(name, "cpu", args[0].dtype)(*args)
    if torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raise where an argument has a tangent: the operators would drop it, and the derivative would be 0."""
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise FlexpertError(
                f"flexpert::{name} has no forward-mode derivative (jvp, jacfwd, hessian); use backward, or"
                " run the model inside flexpert.ops.use_backend('reference')"
            )


def _function(name: str) -> Any:
    """An operator with its derivative as a plain autograd Function.

    A custom operator's own is called through the dispatcher, and asks its schema for defaults, at each call.
    """
    backward_rule, setup = RULES[name]

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = select.kernel(name, "cpu", args[0].dtype)(*args)
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return backward_rule(ctx, *grads)

    return Direct


_FUNCTIONS = {name: _function(name) for name in _OPERATORS if name in RULES}
