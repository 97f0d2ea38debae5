"""Short measurements on the ranks that run now; each returns seconds, equal on all of them.

What one rank does alone is measured on rank 0 while the others wait, and again on all at once: the two tell
how many processors the ranks share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flexpert import ops
from flexpert.core.config import MoEConfig
from flexpert.core.plan import ExecutionPlan
from flexpert.layer import MoE
from flexpert.parallel.group import Group
from flexpert.parallel.mesh import ExpertMesh, expert_mesh
from flexpert.parallel.parallelize import parallelize

Call = Callable[[], Any]


class Stopwatch:
    """Times calls on all ranks of a mesh together.

    Args:
        mesh: all ranks.
        repeats: of each measurement; the median counts.
    """

    def __init__(self, mesh: ExpertMesh, repeats: int = 5) -> None:
        self.everyone, self.repeats = mesh.everyone, repeats

    def together(self, calls: Sequence[Call], repeats: int | None = None) -> list[float]:
        """Median seconds of each, in turns; all ranks do it at once, the slowest counts."""
        return [total for _, total in self.laps(calls, repeats)]

    def laps(self, calls: Sequence[Call], repeats: int | None = None) -> list[tuple[float, float]]:
        """The same, and before it the median of what each call returns: the time at some point of it."""
        times: list[list[list[float]]] = [[] for _ in calls]
        for repeat in range((repeats or self.repeats) + 1):
            for place, call in enumerate(calls):
                self.everyone.barrier()
                began = time.perf_counter()
                lap = call()
                ended = time.perf_counter()
                first = lap - began if isinstance(lap, float) else 0.0
                took = torch.tensor([first, ended - began], dtype=torch.float64)
                self.everyone.all_reduce(took, "max")
                if repeat:  # the first is for what is done once
                    times[place].append(took.tolist())
        return [(statistics.median(a for a, _ in v), statistics.median(b for _, b in v)) for v in times]

    def alone(self, calls: Sequence[Call], repeats: int | None = None) -> list[float]:
        """As `together`, on the first rank while the others wait."""
        idle: Call = lambda: None  # noqa: E731 - what the others do
        return self.together([call if self.everyone.rank == 0 else idle for call in calls], repeats)


def products(
    dtype: torch.dtype, model_dim: int, hidden_dim: int, rows: Sequence[int], activation: str = "gelu"
) -> list[tuple[Call, Call]]:
    """(forward, backward) of one expert's operator, as a layer calls it, for each number of rows."""
    w1 = torch.randn(1, hidden_dim, model_dim).mul_(0.02).to(dtype).requires_grad_()
    w2 = torch.randn(1, model_dim, hidden_dim).mul_(0.02).to(dtype).requires_grad_()
    found: list[tuple[Call, Call]] = []
    for number in rows:
        x = torch.randn(number, model_dim).to(dtype).requires_grad_()
        unit, counts = torch.arange(number), torch.tensor([number])

        def forward(x: Tensor = x, unit: Tensor = unit, counts: Tensor = counts) -> Tensor:
            return ops.grouped_mlp(x, unit, None, counts, None, w1, None, w2, None, activation)

        y = forward()
        grad = torch.randn_like(y)

        def backward(y: Tensor = y, grad: Tensor = grad, x: Tensor = x) -> None:
            torch.autograd.grad(y, (x, w1, w2), grad, retain_graph=True)

        found.append((forward, backward))
    return found


class OneRankLayer:
    """A layer that is laid out over this rank alone: all that a call does, without the others.

    Args:
        tokens, model_dim, hidden_dim, experts: of it.
        dtype: of its rows and parameters.
    """

    def __init__(
        self, tokens: int, model_dim: int, hidden_dim: int, experts: int, dtype: torch.dtype
    ) -> None:
        rank = dist.get_rank()
        mesh = expert_mesh(experts, ranks=[rank], heartbeat=0)
        config = MoEConfig(model_dim=model_dim, hidden_dim=hidden_dim, num_experts=experts)
        self.layer = MoE(config).to(dtype)
        parallelize(self.layer, mesh)
        self.x = torch.randn(tokens, model_dim).to(dtype).requires_grad_()
        self.y: Tensor

    def forward(self, degree: int = 1) -> None:
        """A forward pass; its graph is kept for `backward`."""
        self.y = self.layer(self.x, plan=ExecutionPlan(degree=degree))

    def backward(self) -> None:
        """The backward pass of the last forward."""
        self.y.backward(torch.ones_like(self.y))
        self.layer.zero_grad(set_to_none=True)

    def route(self) -> None:
        """The router alone, forward."""
        from flexpert.core.context import RoutingContext

        self.routing = self.layer.router(self.x, RoutingContext())

    def route_backward(self) -> None:
        """And backward."""
        self.routing.weight_N.sum().backward()
        self.layer.zero_grad(set_to_none=True)


def exchange(group: Group, size: int, flights: int = 1) -> Call:
    """An all-to-all of `size` bytes of each rank, or as many at once as `flights`."""
    each = max(1, size // (4 * group.size))
    x = torch.ones(each * group.size)
    outputs = [torch.empty_like(x) for _ in range(flights)]

    def call() -> None:
        for pending in [group.all_to_all(output, x, async_op=True) for output in outputs]:
            pending.wait()

    return call


def ping(group: Group) -> Call:
    """A byte from the first rank of a group to the second and back; the others do nothing."""
    byte, turns = torch.zeros(1, dtype=torch.uint8), (dist.send, dist.recv)

    def call() -> None:
        if group.rank < 2:
            for turn in turns[:: 1 - 2 * group.rank]:
                turn(byte, group.ranks[1 - group.rank], group=group.process_group)

    return call


def gather(group: Group, size: int) -> Call:
    """An all-gather of `size` bytes of each rank."""
    part = torch.ones(max(1, size // 4))
    whole = torch.empty(group.size * len(part))
    return lambda: group.all_gather(whole, part)


def reduce_scatter(group: Group, size: int) -> Call:
    """A reduce-scatter to `size` bytes on each rank."""
    part = torch.empty(max(1, size // 4))
    whole = torch.ones(group.size * len(part))
    return lambda: group.reduce_scatter(part, whole)


def copy(size: int) -> Call:
    """One tensor copied into another."""
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    return lambda: target.copy_(source)
