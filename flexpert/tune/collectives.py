"""How long the ranks' steps take, each by itself.

Letters: W ranks, P of one replica, C experts that a rank computes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import Transfer

from .machine import Machine
from .workload import DTYPES, LayerShape


class Clock:
    """Times of the steps of a layer's call on a machine.

    Args:
        shape: the layer and its ranks.
        machine: theirs.
    """

    def __init__(self, shape: LayerShape, machine: Machine) -> None:
        self.shape, self.machine = shape, machine
        self.sharing = min(machine.sharing, shape.world)
        self.local = shape.grid.places_per_node() or min(shape.ranks_per_node, shape.ranks)
        self.nodes = -(-shape.ranks // self.local)

    def everyone(self, seconds: float) -> float:
        """Work that takes one rank so long alone, where all ranks do it at once."""
        if self.machine.processors is None:
            return seconds
        return seconds * max(1.0, self.sharing / self.machine.processors)

    def busy(self, seconds_P: Tensor) -> float:
        """Work of unequal length: that of the longest, or all of it on the processors there are."""
        longest = float(seconds_P.max())
        if self.machine.processors is None:
            return longest
        return max(longest, float(seconds_P.mean()) * self.sharing / self.machine.processors)

    def products(self, rows_PC: Tensor, plan: ExecutionPlan, backward: bool) -> float:
        """The products of the experts, in as many chunks as the plan has."""
        shape, degree = self.shape, plan.degree if plan.r else 1
        rate = self.machine.rate(shape.dtype)
        flops = shape.flops_per_row / max(plan.r, 1) * (2 if backward else 1)
        # `unique` of what repeats without end is slow: one row of a view that is expanded stands for all.
        rows_PC = rows_PC[:1] if rows_PC.stride(0) == 0 else rows_PC
        values, inverse = torch.unique(rows_PC, return_inverse=True)
        times = [degree * rate.seconds(n / degree, flops, backward=backward) for n in values.tolist()]
        return self.busy(torch.tensor(times, dtype=torch.float64)[inverse].sum(1))

    def sums(self, plan: ExecutionPlan) -> float:
        """Of the chunks' gradients of parameters: two are read and one is written for each but the first."""
        if plan.r == 0 or plan.degree == 1:
            return 0.0
        size = self.shape.local_experts * self.shape.params_per_expert * self._itemsize() / plan.r
        return self.copy(3 * size * (plan.degree - 1))

    def rows(self, sent: float, computed: float, backward: bool) -> float:
        """Gathering, sorting and combining rows: those a rank sends, and those it computes."""
        overheads = self.machine.overheads
        size = (self.shape.model_dim + self.shape.output_dim) / 2 * self._itemsize()
        per_byte = overheads.row_backward if backward else overheads.row
        return self.everyone(per_byte * size * (sent + computed) / 2)

    def copy(self, moved: float) -> float:
        """So many bytes read and written by every rank."""
        return self.everyone(moved / self.machine.memory_bandwidth)

    def exchange(self, there: Transfer, back: Transfer, algorithm: str, degree: int = 1) -> float:
        """All-to-all in `degree` chunks; what a rank receives is what it sends `back`."""
        machine, hierarchical = self.machine, algorithm != "linear"
        several = degree > 1
        port = machine.between.bandwidth * (machine.between.concurrency if several else 1.0)
        own = machine.inside.bandwidth * (machine.inside.concurrency if several else 1.0)
        between = max(self._per_node(t.between_W) for t in (there, back)) / port
        inside = max(float(t.inside_W.max()) for t in (there, back)) / own
        if not hierarchical:
            work = self._messages(self.local - 1, self.shape.ranks - self.local)
            return self._latency(self.nodes > 1) + math.hypot(degree * work, max(inside, between))
        phases = [
            math.hypot(degree * self._messages(self.local - 1, 0), inside) + self._latency(False),
            math.hypot(degree * self._messages(0, self.nodes - 1), between) + self._latency(True),
        ]
        moved = 2 * float((there.inside_W + there.between_W).double().mean())
        relays = self.everyone(degree * machine.overheads.relay) if self.shape.ranks > 1 else 0.0
        return sum(phases) + self.copy(2 * moved) + relays

    def collective(self, transfer: Transfer, group_W: Tensor, passes: float) -> float:
        """All-gather, reduce-scatter or all-reduce as a ring; `passes` times the steps of an all-gather.

        Args:
            transfer: what ranks send by the plain algorithm.
            group_W: equal numbers for ranks that take part together.
            passes: 1 of an all-gather.
        """
        sizes = group_W.unique(return_counts=True)[1]
        steps = int(sizes.max()) - 1
        sent = float((transfer.inside_W + transfer.between_W).max())
        if not steps or not sent:
            return 0.0
        crosses = bool(transfer.between_W.any())
        link = self.machine.between if crosses else self.machine.inside
        rings = 1
        if crosses:  # each ring that leaves a node does so over the one port
            pairs = torch.unique(torch.stack([self.shape.grid.node_W, group_W]), dim=1)
            spans = torch.bincount(pairs[1])[pairs[1]] > 1
            rings = int(torch.bincount(pairs[0][spans]).max())
        bandwidth = link.ring_bandwidth or link.bandwidth
        # The bytes counted for an all-reduce are those of two passes already.
        size = sent * (passes / 2 if transfer.name == "average" else passes)
        return passes * steps * link.step + rings * size / bandwidth

    def optimizer(self) -> float:
        """AdamW on a rank's experts: four tensors are read, and all but the gradients written."""
        return self.copy(7 * sum(part.numel * part.itemsize for part in self.shape.parts))

    def _messages(self, inside: int, between: int) -> float:
        machine = self.machine
        work = machine.inside.per_message * inside + machine.between.per_message * between
        return self.everyone(machine.overheads.collective + work) if inside + between else 0.0

    def _latency(self, crosses: bool) -> float:
        if self.shape.ranks == 1:
            return 0.0
        return self.machine.between.latency if crosses else self.machine.inside.latency

    def _itemsize(self) -> int:
        return DTYPES[self.shape.dtype].itemsize

    def _per_node(self, bytes_W: Tensor) -> float:
        """Bytes of the node that sends most."""
        node_W = self.shape.grid.node_W
        total = torch.zeros(int(node_W.max()) + 1, dtype=torch.float64)
        return float(total.index_add_(0, node_W, bytes_W.double()).max())
