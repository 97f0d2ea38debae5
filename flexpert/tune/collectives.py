"""How long the ranks' steps take, each by itself.

Letters: W ranks, P of one replica, N nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import Transfer

from .machine import Machine
from .workload import DTYPES, LayerShape


class Clock:
    """Times of steps of a layer's ranks on a machine.

    Args:
        shape: the layer and its ranks.
        machine: theirs.
    """

    def __init__(self, shape: LayerShape, machine: Machine) -> None:
        self.shape, self.machine = shape, machine
        self.sharing = min(machine.sharing, shape.world)

    def everyone(self, seconds: float) -> float:
        """Work that takes one rank so long alone, where all ranks do it at once."""
        if self.machine.processors is None:
            return seconds
        return seconds * max(1.0, self.sharing / self.machine.processors)

    def busy(self, seconds_W: Tensor) -> float:
        """Work of unequal length: the longest, or all of it on the processors there are."""
        longest = float(seconds_W.max())
        if self.machine.processors is None:
            return longest
        total = float(seconds_W.sum()) * self.sharing / len(seconds_W)
        return max(longest, total / self.machine.processors)

    def experts(self, rows_PC: Tensor, plan: ExecutionPlan, backward: bool) -> float:
        """The products of the experts, in as many chunks as the plan has."""
        shape, machine = self.shape, self.machine
        rate = machine.rate(shape.dtype)
        degree = plan.degree if plan.r else 1
        share = shape.flops_per_row / (max(plan.r, 1) if plan.r else 1)
        flops = share * (2 if backward else 1)
        values, inverse = torch.unique(rows_PC, return_inverse=True)
        times = [
            degree * (n / degree * flops / rate.at(n / degree, backward=backward) + machine.overheads.expert)
            if n
            else 0.0
            for n in values.tolist()
        ]
        time_P = torch.tensor(times, dtype=torch.float64)[inverse].sum(1)
        chunks = degree * self.everyone(machine.overheads.chunk) if plan.r else 0.0
        return self.busy(time_P.repeat(shape.replicas)) + chunks

    def exchange(self, there: Transfer, back: Transfer, algorithm: str) -> float:
        """All-to-all; what a rank receives is what it sends `back`."""
        machine, ranks = self.machine, self.shape.ranks
        local = self.shape.grid.places_per_node() or 1
        nodes = ranks // local
        between = max(self._per_node(t.between_W) for t in (there, back)) / machine.between.bandwidth
        inside = max(float(t.inside_W.max()) for t in (there, back)) / machine.inside.bandwidth
        if algorithm == "linear":
            messages = (local - 1, ranks - local)
            phases = 1
        else:
            messages, phases = (local - 1, nodes - 1), 2
        work_W = (
            there.inside_W * machine.inside.per_byte
            + there.between_W * machine.between.per_byte
            + messages[0] * machine.inside.per_message
            + messages[1] * machine.between.per_message
        )
        work = self.busy(work_W) + phases * self.everyone(machine.overheads.collective)
        latency = machine.between.latency if nodes > 1 else machine.inside.latency
        if algorithm != "linear":
            return work + inside + between + latency + machine.inside.latency
        return latency + max(work, inside, between)

    def collective(self, transfer: Transfer) -> float:
        """All-gather, reduce-scatter or all-reduce, as a ring over the ranks."""
        machine = self.machine
        sent_W = transfer.inside_W + transfer.between_W
        if not int(sent_W.max()):
            return 0.0
        crosses = bool(transfer.between_W.any())
        factor = machine.reduce_scatter if transfer.name == "scatter" else 1.0
        link = machine.between if crosses else machine.inside
        work = self.busy(sent_W * link.per_byte * factor) + self.everyone(machine.overheads.collective)
        return link.latency + max(work, factor * float(sent_W.max()) / link.bandwidth)

    def optimizer(self) -> float:
        """AdamW on this rank's experts: 4 tensors read, 3 written."""
        size = sum(part.numel * part.itemsize for part in self.shape.parts)
        return self.everyone(7 * size / self.machine.memory_bandwidth)

    def row_bytes(self) -> int:
        """Of one row as it is computed."""
        return self.shape.model_dim * DTYPES[self.shape.dtype].itemsize

    def _per_node(self, bytes_W: Tensor) -> float:
        """Bytes of the node that sends most."""
        node_W = self.shape.grid.node_W
        total = torch.zeros(int(node_W.max()) + 1, dtype=torch.float64)
        return float(total.index_add_(0, node_W, bytes_W.double()).max())
