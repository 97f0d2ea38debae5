"""How an operator is called: through autograd and the dispatcher only where somebody needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import select
from .library_route import OPERATORS

_OPERATORS = {
    name: getattr(OPERATORS, name).default
    for name in (
        "assign", "gather_rows", "grouped_mlp", "grouped_mlp_packed", "route", "router_logits",
        "scatter_combine",
    )
}  # fmt: skip
_PLAIN = {Tensor, torch.nn.Parameter, bool, float, int, str, torch.dtype, type(None)}


def call(name: str, *args: Any) -> Any:
    """The operator of that name; where no gradient is wanted, without the detour through autograd's Python.

    And where nobody watches, without the dispatcher: decoding waits for every microsecond, and it takes ten.
    """
    operator = _OPERATORS[name]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*args)
    if is_unwatched(args):
        return select.kernel(name, "cpu", args[0].dtype)(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def is_unwatched(args: tuple[Any, ...]) -> bool:
    """Whether the arguments are plain tensors on the CPU, and no mode, transform or profiler watches."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or not args[0].is_cpu:
        return False
    return _PLAIN.issuperset(map(type, args))
