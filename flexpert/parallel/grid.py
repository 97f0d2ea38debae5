"""How ranks lie on experts, slices and nodes, as numbers: what `ExpertMesh` is without its process groups.

Letters: W ranks, as replicas x X expert ranks x S slices; P = X S ranks of a replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .mesh import ExpertMesh


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """The factors of a mesh, and the nodes of its ranks.

    Attributes:
        replicas, expert_ranks, slices: as of `ExpertMesh`.
        ranks_per_node: neighbours that share a node.
        ranks: global ranks in order; None for 0 to W - 1.
    """

    replicas: int
    expert_ranks: int
    slices: int
    ranks_per_node: int
    ranks: tuple[int, ...] | None = None

    @classmethod
    def of(cls, mesh: ExpertMesh) -> RankGrid:
        """That of a live mesh."""
        return cls(
            replicas=mesh.replicas,
            expert_ranks=mesh.expert_ranks,
            slices=mesh.slices,
            ranks_per_node=mesh.ranks_per_node,
            ranks=mesh.ranks,
        )

    @property
    def size(self) -> int:
        """P."""
        return self.expert_ranks * self.slices

    @property
    def world(self) -> int:
        """W."""
        return self.replicas * self.size

    @cached_property
    def node_W(self) -> Tensor:
        """int64: the node of each rank."""
        ranks = torch.arange(self.world) if self.ranks is None else torch.tensor(self.ranks)
        return ranks // self.ranks_per_node

    @property
    def legal_r(self) -> tuple[int, ...]:
        """The values of r that a plan may have: 0 and the divisors of S."""
        return (0, *(r for r in range(1, self.slices + 1) if self.slices % r == 0))

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """int64 (W,) each: replica, place among the expert ranks, slice."""
        rank_W = torch.arange(self.world)
        return rank_W // self.size, rank_W // self.slices % self.expert_ranks, rank_W % self.slices

    def places_per_node(self, replica: int = 0) -> int | None:
        """Ranks of a replica on each node it lies on; None where these differ, so that 2DH does not fit."""
        node_P = self.node_W[replica * self.size : (replica + 1) * self.size]
        nodes, counts = node_P.unique(return_counts=True)
        if counts.min() != counts.max() or not torch.equal(node_P, nodes.repeat_interleave(counts)):
            return None
        return int(counts[0])
