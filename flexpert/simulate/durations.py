"""How long each rank's part of a step takes by itself, in seconds, as tensors over the ranks.

The constants and their meaning are the cost model's (`flexpert.tune`), which predicts one figure for all
ranks; here each rank and each node has its own, with its own speed and link.

Letters: W ranks, P of one replica, N nodes, L ranks of a node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import Transfer
from flexpert.tune import LayerShape

from .clocks import Stage
from .cluster import Cluster


class Durations:
    """Durations on a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.machine = cluster, cluster.machine
        self.node_W, self.link_N = cluster.node_W, cluster.link_N
        self.world_W = torch.zeros(cluster.ranks, dtype=torch.int64)
        self.alone_W = torch.arange(cluster.ranks)

    def flat(self, seconds: float) -> float:
        """Work of all ranks at once, on the processors there are."""
        machine = self.machine
        if machine.processors is None:
            return seconds
        return seconds * max(1.0, min(machine.sharing, self.cluster.ranks) / machine.processors)

    def uneven(self, seconds_W: Tensor) -> Tensor:
        """The same for work of unequal length: none is done before the processors could do all of it."""
        machine = self.machine
        if machine.processors is None:
            return seconds_W
        sharing = min(machine.sharing, self.cluster.ranks)
        return seconds_W.clamp(min=float(seconds_W.mean()) * sharing / machine.processors)

    def products(self, flops: float, rows: float, dtype: str, backward: bool = False) -> float:
        """Products of so many operations over so many rows at once."""
        if not flops or not rows:
            return 0.0
        return self.flat(self.machine.rate(dtype).seconds(rows, flops / rows, backward=backward))

    def copies(self, size: float) -> float:
        """Reading and writing so many bytes."""
        return self.flat(size / self.machine.memory_bandwidth)

    def experts(
        self, shape: LayerShape, rows_PC: Tensor, plan: ExecutionPlan, backward: bool, fraction: float
    ) -> Tensor:
        """(W,): the experts' products for a fraction of their rows."""
        rate = self.machine.rate(shape.dtype)
        flops = shape.flops_per_row / max(plan.r, 1) * (2 if backward else 1)
        values, inverse = torch.unique(rows_PC, return_inverse=True)
        times = [rate.seconds(n * fraction, flops, backward=backward) for n in values.tolist()]
        time_P = torch.tensor(times, dtype=torch.float64)[inverse].sum(1)
        return self.uneven(time_P.repeat(shape.replicas))

    def sending(self, shape: LayerShape, algorithm: str) -> float:
        """Processor time of an exchange's messages where ranks share processors; else the links' alone, 0."""
        machine, local = self.machine, shape.grid.places_per_node() or 1
        if machine.processors is None or shape.ranks == 1:
            return 0.0
        inside, between = machine.inside.per_message, machine.between.per_message
        start = machine.overheads.collective
        if algorithm == "linear":
            return self.flat(start + (local - 1) * inside + (shape.ranks - local) * between)
        nodes = shape.ranks // local
        return self.flat(2 * start + (local - 1) * inside + (nodes - 1) * between + machine.overheads.relay)

    def exchange(
        self, shape: LayerShape, there: Transfer, back: Transfer, algorithm: str, fraction: float
    ) -> list[Stage]:
        """All-to-all inside each replica of a fraction of the rows: what is received is what is sent back."""
        machine, local = self.machine, shape.grid.places_per_node() or 1
        nodes = max(shape.ranks // local, 1)
        inside_W = torch.maximum(there.inside_W, back.inside_W) * fraction
        between_W = self._port(torch.maximum(there.between_W, back.between_W) * fraction)
        replica_W = self.alone_W // shape.ranks
        start = self.flat(machine.overheads.collective)
        wire_W = inside_W / machine.inside.bandwidth
        if algorithm == "linear":
            messages = (min(local, shape.ranks) - 1) * machine.inside.per_message
            messages += (shape.ranks - min(local, shape.ranks)) * machine.between.per_message
            latency = machine.between.latency if nodes > 1 else machine.inside.latency
            longest_W = torch.maximum(wire_W, between_W).clamp(min=self.flat(messages))
            return [Stage(start + latency + longest_W, replica_W)]
        # Aligned before each of the two stages: every byte is read and written.
        copied_W = (there.inside_W + there.between_W) * self.copies(2 * fraction)
        first = self.flat((local - 1) * machine.inside.per_message)
        second = self.flat((nodes - 1) * machine.between.per_message)
        inner_W = start + machine.inside.latency + copied_W + wire_W.clamp(min=first)
        outer_W = start + machine.between.latency + copied_W + between_W.clamp(min=second)
        place_W = replica_W * local + self.alone_W % shape.ranks % local
        inner = replica_W * self.cluster.nodes + self.node_W
        stages = [Stage(inner_W, inner), Stage(outer_W, place_W)]
        return stages if there.name == "dispatch" else stages[::-1]

    def ring(self, size_W: Tensor, group_W: Tensor, *, factor: float = 1.0) -> Stage:
        """A collective of groups as rings: each rank sends `size_W` bytes in all to its neighbour."""
        machine = self.machine
        on_node = _members(group_W * self.cluster.nodes + self.node_W)
        members = _members(group_W)
        crosses = members > on_node
        # One of a group's ranks on a node sends to the next node; rings share that part.
        port_W = self._port(torch.where(crosses, size_W / on_node, torch.zeros_like(size_W)))
        rings = [link.ring_bandwidth or link.bandwidth for link in (machine.inside, machine.between)]
        port_W = port_W * machine.between.bandwidth / rings[1]
        wire_W = torch.maximum(torch.where(on_node > 1, size_W / rings[0], 0.0), port_W)
        # A ring takes a step for each member but one, a tree the logarithm of it there and back.
        steps = torch.minimum(members - 1, 2 * torch.log2(members.double()).ceil())
        step = [link.step or link.latency for link in (machine.inside, machine.between)]
        latency = torch.where(crosses, step[1], step[0]) * steps
        seconds_W = self.flat(machine.overheads.collective) + latency + factor * wire_W
        return Stage(torch.where((members > 1) & (size_W > 0), seconds_W, 0.0), group_W)

    def all_reduce(self, size: float, group_W: Tensor) -> Stage:
        """The sum of `size` bytes over each group."""
        members = _members(group_W).double()
        return self.ring(2 * size * (members - 1) / members, group_W)

    def all_gather(self, size: float, group_W: Tensor) -> Stage:
        """Parts of each group's ranks joined to `size` bytes."""
        members = _members(group_W).double()
        return self.ring(size * (members - 1) / members, group_W)

    def reduce_scatter(self, size: float, group_W: Tensor) -> Stage:
        """`size` bytes of each of a group's ranks, summed and dealt out."""
        members = _members(group_W).double()
        return self.ring(size * (members - 1) / members, group_W, factor=self.machine.reduce_scatter)

    def _port(self, bytes_W: Tensor) -> Tensor:
        """(W,): seconds in which each rank's node sends what all its ranks send to other nodes."""
        total_N = torch.zeros(self.cluster.nodes, dtype=torch.float64)
        total_N.index_add_(0, self.node_W, bytes_W.double())
        return (total_N / (self.machine.between.bandwidth * self.link_N))[self.node_W]


def _members(group_W: Tensor) -> Tensor:
    """int64 (W,): how many ranks each rank's group has."""
    _, place_W, count = group_W.unique(return_inverse=True, return_counts=True)
    return count[place_W]
