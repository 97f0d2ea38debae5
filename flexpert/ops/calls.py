"""How an operator is called: through autograd and the dispatcher only where somebody needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import select
from .library import RULES
from .library_route import OPERATORS
from .watched import is_unwatched

_OPERATORS = {
    name: getattr(OPERATORS, name).default
    for name in (
        "assign", "gather_rows", "grouped_mlp", "grouped_mlp_packed", "route", "router_logits",
        "scatter_combine",
    )
}  # fmt: skip


def call(name: str, *args: Any) -> Any:
    """The operator of that name; where nobody watches, without the detour through autograd's Python.

    Nor through the dispatcher: decoding waits for every microsecond, and it takes ten.
    """
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
