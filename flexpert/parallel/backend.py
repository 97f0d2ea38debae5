"""How collectives of torch.distributed are started here, in their asynchronous form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# PyTorch renames these; the old names warn.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
_ASYNC = dist.AllToAllOptions()
_ASYNC.asyncOp = True


def start_all_to_all(
    group: dist.ProcessGroup, output: Tensor, source: Tensor, receive: list[int], send: list[int]
) -> dist.Work:
    """`dist.all_to_all_single` without its checks and the dispatcher, which cost more than starting it."""
    start: Any = group._get_backend(source.device).alltoall_base  # type: ignore[attr-defined]
    work: dist.Work = start(as_bytes(output), as_bytes(source), receive, send, _ASYNC)
    return work


def start_all_gather(group: dist.ProcessGroup, output: Tensor, source: Tensor) -> dist.Work | None:
    """Of tensors that are concatenated on the first dimension."""
    work: dist.Work | None = all_gather(as_bytes(output), as_bytes(source), group=group, async_op=True)
    return work


def as_bytes(tensor: Tensor) -> Tensor:
    """float8, which few backends know, as the bytes it is; others as they are."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 and tensor.is_floating_point() else tensor


def call_when_done(work: dist.Work, function: Callable[[], None]) -> None:
    """Call from the thread that completes the work, also when it failed; never where it cannot tell."""
    try:
        future = work.get_future()
    except RuntimeError:  # a backend without them; `wait` then tells
        return
    future.add_done_callback(lambda _: function())
