"""Whether an operator may be called directly, because nobody needs to see that it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = {Tensor, torch.nn.Parameter, bool, float, int, list, str, torch.dtype, type(None)}


def is_unwatched(args: tuple[Any, ...]) -> bool:
    """Whether all tensors are plain ones on the CPU, and no mode, transform, profiler or compiler watches.

    Args:
        args: of an operator, a tensor first; lists hold no tensors.
    """
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or not _PLAIN.issuperset(map(type, args)):
        return False
    return all(arg.is_cpu for arg in args if isinstance(arg, Tensor))
