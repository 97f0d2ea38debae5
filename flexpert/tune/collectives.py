"""How long the ranks' steps take, each by itself.

Letters: W ranks, P of one replica, C experts that a rank computes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import Part, averaging_group, counts_transfers, gathering_group

from .machine import Machine
from .volumes import Volume, volume_of
from .workload import DTYPES, LayerShape


class Clock:
    """Times of the steps of a layer's call on a machine; those that no row changes are remembered.

    Args:
        shape: the layer and its ranks.
        machine: theirs.
    """

    def __init__(self, shape: LayerShape, machine: Machine) -> None:
        self.shape, self.machine = shape, machine
        self.sharing = min(machine.sharing, shape.world)
        self.local = shape.local_ranks or min(shape.ranks_per_node, shape.ranks)
        self.nodes = -(-shape.ranks // self.local)
        self.parameters = lru_cache(maxsize=None)(self._parameters)
        self.counts = lru_cache(maxsize=None)(self._counts)

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
        # One row of a view that is expanded stands for all.
        rows_PC = rows_PC[:1] if rows_PC.stride(0) == 0 else rows_PC
        times_PC = rate.seconds_of(rows_PC.double() / degree, flops, backward=backward)
        return degree * self.busy(times_PC.sum(1))

    def sums(self, plan: ExecutionPlan) -> float:
        """Of the chunks' gradients of parameters: two are read and one is written for each but the first."""
        if plan.r == 0 or plan.degree == 1:
            return 0.0
        size = self.shape.local_experts * self.shape.params_per_expert * self._itemsize() / plan.r
        return self.copy(3 * size * (plan.degree - 1))

    def rows(self, sent: float, computed: float, cut: bool, backward: bool) -> float:
        """Gathering, sorting and combining rows: those a rank sends, and those it computes.

        Args:
            sent, computed: rows.
            cut: they are picked one by one, for chunks or because each goes to several ranks.
            backward: which pass.
        """
        overheads = self.machine.overheads
        size = (self.shape.model_dim + self.shape.output_dim) / 2 * self._itemsize()
        per_byte = overheads.row_backward if backward else overheads.row
        picked = (overheads.cut_backward if backward else overheads.cut) if cut else 0.0
        return self.everyone(size * (per_byte * (sent + computed) / 2 + picked * sent))

    def copy(self, moved: float) -> float:
        """So many bytes read and written by every rank."""
        return self.everyone(moved / self.machine.memory_bandwidth)

    def exchange(self, volume: Volume, algorithm: str, degree: int = 1) -> float:
        """All-to-all in `degree` chunks."""
        machine, hierarchical = self.machine, algorithm != "linear"
        several = degree > 1
        port = machine.between.bandwidth * (machine.between.concurrency if several else 1.0)
        own = machine.inside.bandwidth * (machine.inside.concurrency if several else 1.0)
        between, inside = volume.between / port, volume.inside / own
        if not hierarchical:
            work = self._messages(self.local - 1, self.shape.ranks - self.local)
            return self._latency(self.nodes > 1) + self._both(work, max(inside, between), degree)
        phases = [
            self._both(self._messages(self.local - 1, 0), inside, degree) + self._latency(False),
            self._both(self._messages(0, self.nodes - 1), between, degree) + self._latency(True),
        ]
        relays = self.everyone(degree * machine.overheads.relay) if self.shape.ranks > 1 else 0.0
        return sum(phases) + self.copy(4 * volume.sent) + relays

    def busy_sending(self, algorithm: str, degree: int) -> float:
        """What an exchange takes of processors that the ranks share; 0 where each has its own."""
        if self.machine.processors is None:
            return 0.0
        if algorithm == "linear":
            return degree * self._messages(self.local - 1, self.shape.ranks - self.local)
        return degree * (
            self._messages(self.local - 1, 0)
            + self._messages(0, self.nodes - 1)
            + self.everyone(self.machine.overheads.relay)
        )

    def _both(self, messages: float, wire: float, degree: int) -> float:
        """Messages of one chunk, and the bytes of all, which overlap in part."""
        if self.machine.processors is None:
            return math.hypot(degree * messages, wire)
        return math.hypot(messages, wire) + (degree - 1) * messages

    def _counts(self, travels: bool, algorithm: str, capacity: str, known: int | None) -> float:
        """Seconds of the messages that go ahead of the rows."""
        shape = self.shape
        plan = ExecutionPlan(r=int(travels), algorithm=algorithm, capacity=capacity)
        messages = counts_transfers(shape.grid, shape.local_experts, plan, known, shape.verify)
        total = 0.0
        for i, message in enumerate(messages):
            volume = volume_of(shape, (message.inside_W, message.between_W))
            # With `verify` the first message goes directly.
            total += self.exchange(volume, "linear" if shape.verify and not i else algorithm)
        return total

    def _parameters(self, r: int) -> dict[str, float]:
        """Seconds of gathering parameters, reducing their gradients, and averaging these, under r."""
        found = dict.fromkeys(("gather", "scatter", "average"), 0.0)
        grid = self.shape.grid
        for part in self.shape.parts:
            group_W = gathering_group(grid, part, r)
            size = int((group_W == group_W[0]).sum())
            if size > 1:
                joined = self.copy(4 * size * part.numel * part.itemsize)  # from, or into, the ranks' parts
                gathered = DTYPES[self.shape.dtype].itemsize * part.numel
                found["gather"] += self._ring(gathered, group_W, 1.0) + joined
                scattered = part.numel * part.itemsize
                found["scatter"] += self._ring(scattered, group_W, self.machine.reduce_scatter) + joined
            found["average"] += self._average(part)
        return found

    def _average(self, part: Part) -> float:
        group_W = averaging_group(self.shape.grid, part)
        size = int((group_W == group_W[0]).sum())
        # An all-reduce passes each of the ranks' portions around twice.
        return self._ring(part.numel * part.itemsize / size, group_W, 2.0) if size > 1 else 0.0

    def _ring(self, size: float, group_W: Tensor, passes: float) -> float:
        """A ring in which each rank's `size` bytes go around; `passes` times what an all-gather takes.

        Args:
            size: bytes of each rank.
            group_W: equal numbers for ranks that take part together.
            passes: 1 of an all-gather.
        """
        steps = int(group_W.unique(return_counts=True)[1].max()) - 1
        if not steps or not size:
            return 0.0
        node_W = self.shape.grid.node_W
        pairs = torch.unique(torch.stack([node_W, group_W]), dim=1)
        spans = torch.bincount(pairs[1])[pairs[1]] > 1  # of each (node, group): whether the group leaves it
        crosses = bool(spans.any())
        # Each ring that leaves a node does so over the one port.
        rings = int(torch.bincount(pairs[0][spans]).max()) if crosses else 1
        link = self.machine.between if crosses else self.machine.inside
        bandwidth = link.ring_bandwidth or link.bandwidth
        return passes * steps * (link.step + rings * size / bandwidth)

    def optimizer(self) -> float:
        """AdamW on a rank's experts: four tensors are read, and all but the gradients written."""
        return self.copy(7 * sum(part.numel * part.itemsize for part in self.shape.parts))

    def _messages(self, inside: int, between: int) -> float:
        """Issuing one collective, and a rank's messages; nothing where there are none."""
        machine = self.machine
        work = inside * machine.inside.per_message + between * machine.between.per_message
        return self.everyone(machine.overheads.collective + work) if inside + between else 0.0

    def _latency(self, crosses: bool) -> float:
        if self.shape.ranks == 1:
            return 0.0
        return self.machine.between.latency if crosses else self.machine.inside.latency

    def _itemsize(self) -> int:
        return DTYPES[self.shape.dtype].itemsize
