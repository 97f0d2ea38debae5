"""How an operator is called: through autograd and the dispatcher only where somebody needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flexpert.core.errors import FlexpertError

from . import select
from .library_route import OPERATORS

_OPERATORS = {
    name: getattr(OPERATORS, name).default
    for name in (
        "assign", "gather_rows", "grouped_linear", "grouped_mlp", "grouped_mlp_packed", "route",
        "router_logits", "scatter_combine",
    )
}  # fmt: skip
_PLAIN = {Tensor, torch.nn.Parameter, bool, float, int, str, torch.dtype, type(None)}


def call(name: str, *args: Any) -> Any:
    """The operator of that name; where no gradient is wanted, without the detour through autograd's Python.

    And where nobody watches, without the dispatcher: decoding waits for every microsecond, and it takes ten.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(name, args)
    operator = _OPERATORS[name]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*args)
    if is_unwatched(args):
        return select.kernel(name, "cpu", args[0].dtype)(*args)
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


def is_unwatched(args: tuple[Any, ...]) -> bool:
    """Whether the arguments are plain tensors on the CPU, and no mode, transform or profiler watches."""
    if (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or not args[0].is_cpu:
        return False
    return _PLAIN.issuperset(map(type, args))
