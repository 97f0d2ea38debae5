"""What one call's exchanges move, as the few numbers that their time depends on.

Plans that differ in other things than these share them: what was counted once is remembered.

Letters: P ranks of a replica, E experts, e of them on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import counts_on_wire
from flexpert.parallel.rows import RowTraffic

from .workload import LayerShape, Workload


@dataclass(frozen=True)
class Volume:
    """Rows or bytes of one exchange, in the direction in which more is sent at one place.

    Attributes:
        between: to other nodes, of the node that sends or receives most.
        inside: to others of its node, of the rank that sends or receives most.
        sent: of a rank, on average.
    """

    between: float
    inside: float
    sent: float

    def times(self, size: float) -> Volume:
        """Of rows: the bytes, with so many of each."""
        return Volume(self.between * size, self.inside * size, self.sent * size)


class Volumes:
    """The rows of one call under every plan.

    Args:
        shape: the layer and its ranks.
        workload: its rows.

    Attributes:
        sent: rows of a rank, the mean.
        computed: see `_computed`.
        exchanged: see `_exchanged`.
    """

    def __init__(self, shape: LayerShape, workload: Workload) -> None:
        self.shape, self.workload = shape, workload
        self.sent = float(workload.rows_PE.sum(1).double().mean())
        self._traffic = lru_cache(maxsize=None)(self._count)
        self.computed = lru_cache(maxsize=None)(self._computed)
        self.exchanged = lru_cache(maxsize=None)(self._exchanged)

    def _count(self, r: int, capacity: str) -> RowTraffic:
        plan = ExecutionPlan(r=r, capacity=capacity)
        rows_PE = counts_on_wire(self.workload.rows_PE, plan, self.workload.capacity)
        return RowTraffic(self.shape.grid, rows_PE, r)

    def _computed(self, r: int, capacity: str) -> Tensor:
        """int64 (P, e) for r >= 1, (P, E) for r = 0: rows that each rank computes for each of its experts."""
        return computed_rows(self.shape, ExecutionPlan(r=r, capacity=capacity), self.workload)

    def _exchanged(self, r: int, capacity: str, algorithm: str) -> Volume:
        """Rows of one exchange, there or back: what a rank receives one way it sends the other."""
        traffic = self._traffic(r, capacity)
        ways = [traffic.sent(algorithm, reverse) for reverse in (False, True)]
        return volume_of(self.shape, *ways)


def volume_of(shape: LayerShape, *ways: tuple[Tensor, Tensor]) -> Volume:
    """From what all ranks send inside their nodes and between them, in each direction.

    Args:
        shape: of the ranks.
        ways: int64 (W,) twice for each direction.
    """
    node_W = shape.grid.node_W
    nodes = int(node_W[-1]) + 1
    between_DN = torch.stack([torch.bincount(node_W, between_W, nodes) for _, between_W in ways])
    inside_DW = torch.stack([inside_W for inside_W, _ in ways])
    sent = float((ways[0][0] + ways[0][1]).double().mean())
    return Volume(float(between_DN.max()), float(inside_DW.max()), sent)


def computed_rows(shape: LayerShape, plan: ExecutionPlan, workload: Workload) -> Tensor:
    """int64 (P, e) for r >= 1, (P, E) for r = 0: rows that each rank computes for each of its experts."""
    if plan.r == 0:
        return workload.rows_PE
    rows_PE = counts_on_wire(workload.rows_PE, plan, workload.capacity)
    block = shape.slices // plan.r
    rows_BE = RowTraffic.by_class(rows_PE, block)
    place_P = torch.arange(shape.ranks)
    rows_BXe = rows_BE.unflatten(1, (shape.expert_ranks, -1))
    return rows_BXe[place_P % shape.slices % block, place_P // shape.slices]
