"""Sums and the like over a group: by which steps, for which size and device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch import distributed as dist

from . import backend
from .pending import Pending

if TYPE_CHECKING:
    from .group import Group

ReduceName = Literal["sum", "max", "min", "avg"]
REDUCE = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "avg": dist.ReduceOp.AVG,
}
_REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda parts: parts.sum(0, dtype=parts.dtype),
    "max": lambda parts: parts.amax(0),
    "min": lambda parts: parts.amin(0),
    "avg": lambda parts: parts.mean(0),
}
SMALL = 4096  # bytes up to which the number of steps decides


def all_reduce(group: Group, tensor: Tensor, op: ReduceName, async_op: bool) -> Pending:
    """Reduce `tensor` in place, contiguous or not; it is known that the operation exists for its dtype."""
    target = tensor.detach()
    buffer = target.contiguous()
    edges = [buffer.numel() * p // group.size for p in range(group.size + 1)]
    portions = [(stop - start) * buffer.element_size() for start, stop in pairwise(edges)]
    group.traffic.add("all_reduce", portions, group.rank, group.node_of)
    group.traffic.add("all_reduce", [portions[group.rank]] * group.size, group.rank, group.node_of)
    if buffer.is_cpu and buffer.nbytes <= SMALL:
        return _reduce_at_once(group, target, buffer, op, async_op)
    finish = None if buffer.data_ptr() == target.data_ptr() else lambda: target.copy_(buffer)
    return group.run(
        "all_reduce",
        (buffer, buffer),
        lambda pg: dist.all_reduce(buffer, REDUCE[op], group=pg, async_op=True),
        async_op,
        finish=finish,
    )


def _reduce_at_once(group: Group, target: Tensor, source: Tensor, op: ReduceName, async_op: bool) -> Pending:
    """Every rank sends its few numbers to every other: one step, where gloo's ring takes 2 (n - 1)."""
    own = source.reshape(1, -1).expand(group.size, -1).contiguous()
    parts, even = torch.empty_like(own), [1] * group.size

    def reduce() -> None:
        target.copy_(_REDUCED[op](parts).view(target.shape))

    return group.run(
        "all_reduce",
        (parts, own),
        lambda pg: backend.start_all_to_all(pg, parts, own, even, even),
        async_op,
        finish=reduce,
    )


def reduce_scatter(group: Group, output: Tensor, source: Tensor, async_op: bool) -> Pending:
    """Sum the sources, contiguous and known to fit; each rank keeps its part."""
    group.traffic.add("reduce_scatter", [output.nbytes] * group.size, group.rank, group.node_of)
    if not source.is_cpu:
        return group.run(
            "reduce_scatter",
            (output, source),
            lambda pg: backend.reduce_scatter(output, source, group=pg, async_op=True),
            async_op,
        )
    # Gloo reduces everything on every rank, in twice the bytes, and cuts the result.
    parts = torch.empty_like(source)
    even = [output.shape[0]] * group.size

    def add() -> None:
        torch.sum(parts.view(group.size, *output.shape), 0, dtype=output.dtype, out=output.detach())

    return group.run(
        "reduce_scatter",
        (parts, source),
        lambda pg: backend.start_all_to_all(pg, parts, source, even, even),
        async_op,
        finish=add,
    )
