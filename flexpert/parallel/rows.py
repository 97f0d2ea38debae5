"""How many rows each rank sends to others of its node and of other nodes, under a plan.

Letters: W ranks of a mesh, P of one replica, X expert ranks, S slices, B slices of a block, N nodes, L ranks
of a node.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .grid import RankGrid


class RowTraffic:
    """The rows of one exchange, of every rank, as sums over the ranks at their other end.

    Args:
        grid: the ranks.
        counts_PC: int64, rows of each rank of a replica for each class, which the expert ranks share equally.
        r: of the plan, >= 1: a row goes to r of the S ranks that hold its expert.
    """

    def __init__(self, grid: RankGrid, counts_PC: Tensor, r: int) -> None:
        self.grid, self.r = grid, r
        self.block = grid.slices // r
        self._sent: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
        self.rows_PX = counts_PC.unflatten(1, (grid.expert_ranks, -1)).sum(2)

    def sent(self, algorithm: str, reverse: bool) -> tuple[Tensor, Tensor]:
        """int64 (W,) each: rows that every rank sends inside its node and to other nodes."""
        if (algorithm, reverse) not in self._sent:
            self._sent[algorithm, reverse] = self._count(algorithm, reverse)
        return self._sent[algorithm, reverse]

    def _count(self, algorithm: str, reverse: bool) -> tuple[Tensor, Tensor]:
        count = self._linear if algorithm == "linear" else self._hierarchical
        aligned = self.grid.ranks is None and self.grid.size % self.grid.ranks_per_node == 0
        replicas = 1 if aligned else self.grid.replicas
        pairs = [count(replica, reverse) for replica in range(replicas)]
        repeats = self.grid.replicas // replicas
        inside_W, between_W = (torch.cat(side).repeat(repeats) for side in zip(*pairs, strict=True))
        return inside_W, between_W

    @cached_property
    def received_P(self) -> Tensor:
        """int64: rows that each rank computes for others and itself."""
        rows_BX = self.by_class(self.rows_PX, self.block)
        expert_P, slice_P = self._targets()
        received_P: Tensor = rows_BX[slice_P % self.block, expert_P]
        return received_P

    @staticmethod
    def by_class(rows_PC: Tensor, block: int) -> Tensor:
        """(B, C): summed over the sources that send to the same slices."""
        rows_BC: Tensor = rows_PC.unflatten(0, (-1, block)).sum(0)
        return rows_BC

    def _targets(self) -> tuple[Tensor, Tensor]:
        place_P = torch.arange(self.grid.size)
        return place_P // self.grid.slices, place_P % self.grid.slices

    def _own_P(self) -> Tensor:
        """Rows that each rank keeps."""
        expert_P, slice_P = self._targets()
        place_P = torch.arange(self.grid.size)
        mine = slice_P % self.block == place_P % self.block
        own_P: Tensor = self.rows_PX[place_P, expert_P] * mine
        return own_P

    def _linear(self, replica: int, reverse: bool) -> tuple[Tensor, Tensor]:
        own_P, node_P = self._own_P(), self._nodes(replica)
        if reverse:
            all_P, near_P = self.received_P, self._from_nodes(node_P)[node_P, torch.arange(len(node_P))]
        else:
            all_P = self.rows_PX.sum(1) * self.r
            near_P = self._to_bins(node_P)[torch.arange(len(node_P)), node_P]
        return near_P - own_P, all_P - near_P

    def _hierarchical(self, replica: int, reverse: bool) -> tuple[Tensor, Tensor]:
        node_P = self._nodes(replica)
        local = len(node_P) // (int(node_P.max()) + 1)
        place_P = torch.arange(len(node_P)) % local
        to_PL = self._to_bins(place_P)
        from_NP = self._from_nodes(node_P)
        if reverse:  # between the nodes to the source's node, then inside it
            relayed_NL = to_PL.view(-1, local, local).sum(1)
            inside_P = relayed_NL.flatten() - to_PL[torch.arange(len(node_P)), place_P]
            between_P = self.received_P - from_NP[node_P, torch.arange(len(node_P))]
        else:
            inside_P = self.rows_PX.sum(1) * self.r - to_PL[torch.arange(len(node_P)), place_P]
            relayed_NNL = from_NP.view(len(from_NP), -1, local)
            nodes = torch.arange(len(from_NP))
            between_P = (relayed_NNL.sum(1) - relayed_NNL[nodes, nodes]).flatten()
        return inside_P, between_P

    def _nodes(self, replica: int) -> Tensor:
        """(P,): the node of each rank of a replica, counted from 0."""
        node_P = self.grid.node_W[replica * self.grid.size : (replica + 1) * self.grid.size]
        own_P: Tensor = node_P.unique(return_inverse=True)[1]
        return own_P

    def _to_bins(self, bin_P: Tensor) -> Tensor:
        """(P, bins): rows from each rank to all those of a bin."""
        grid = self.grid
        found: Tensor = self.rows_PX.new_zeros(grid.size, int(bin_P.max()) + 1)
        bin_XS = bin_P.view(grid.expert_ranks, grid.slices)
        for kind in range(self.block):
            rows = self.rows_PX[kind :: self.block]
            for slice_ in range(kind, grid.slices, self.block):
                found[kind :: self.block].index_add_(1, bin_XS[:, slice_], rows)
        return found

    def _from_nodes(self, node_P: Tensor) -> Tensor:
        """(N, P): rows from all ranks of a node to each rank."""
        nodes = int(node_P.max()) + 1
        kind_P = torch.arange(self.grid.size) % self.block
        sums = self.rows_PX.new_zeros(nodes * self.block, self.grid.expert_ranks)
        sums.index_add_(0, node_P * self.block + kind_P, self.rows_PX)
        expert_P, slice_P = self._targets()
        from_NP: Tensor = sums.view(nodes, self.block, -1)[:, slice_P % self.block, expert_P]
        return from_NP
