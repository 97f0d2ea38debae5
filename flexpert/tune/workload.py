"""The rows that one call of a layer gets.

Letters: P ranks of a replica, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.core.errors import InputError

from .shape import DTYPES, LayerShape

__all__ = ["DTYPES", "LayerShape", "Workload"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The rows of one call.

    Attributes:
        rows_PE: int64 (P, E), rows of each rank of a replica for each expert. May be an expanded view, so
            that thousands of equal ranks cost no memory.
        tokens: of one rank.
        capacity: rows of an expert's buffer where the router limits them; None where it does not.

    Raises:
        InputError: rows that are no counts.
    """

    rows_PE: Tensor
    tokens: int
    capacity: int | None = None

    def __post_init__(self) -> None:
        rows = self.rows_PE
        if rows.dim() != 2 or rows.dtype != torch.int64:
            raise InputError(
                f"workload: rows_PE is {rows.dtype} of shape {tuple(rows.shape)}; int64 (ranks, experts) "
                f"expected"
            )
        if not isinstance(self.tokens, int) or self.tokens < 0:
            raise InputError(f"workload: tokens={self.tokens!r}, expected an integer >= 0")
        if self.capacity is not None and (not isinstance(self.capacity, int) or self.capacity < 0):
            raise InputError(f"workload: capacity={self.capacity!r}, expected an integer >= 0 or None")

    @classmethod
    def uniform(
        cls,
        shape: LayerShape,
        rows_per_rank: int,
        *,
        tokens: int | None = None,
        capacity: int | None = None,
    ) -> Workload:
        """Equally many rows for every expert; a remainder goes to the first ones.

        Args:
            shape: of the layer.
            rows_per_rank: tokens times experts of each.
            tokens: of one rank; None for as many as rows.
            capacity: as of the workload.
        """
        each, more = divmod(rows_per_rank, shape.num_experts)
        rows_1E = (each + (torch.arange(shape.num_experts) < more)).to(torch.int64)[None]
        return cls(
            rows_PE=rows_1E.expand(shape.ranks, -1),
            tokens=rows_per_rank if tokens is None else tokens,
            capacity=capacity,
        )

    @classmethod
    def zipf(
        cls,
        shape: LayerShape,
        rows_per_rank: int,
        *,
        skew: float,
        seed: int = 0,
        tokens: int | None = None,
        capacity: int | None = None,
    ) -> Workload:
        """The i-th busiest expert has i^-skew times the rows of the busiest; which it is, the seed says.

        Args:
            shape: of the layer.
            rows_per_rank: as in `uniform`; each rank draws its own from the one distribution.
            skew: 0 is uniform in expectation; >= 0.
            seed: of the draw.
            tokens: as in `uniform`.
            capacity: rows past it are dropped, as of the workload.
        """
        if not skew >= 0:
            raise InputError(f"workload: skew={skew!r}, expected a number >= 0")
        generator = torch.Generator().manual_seed(seed)
        share_E = torch.arange(1, shape.num_experts + 1, dtype=torch.float64) ** -skew
        share_E = share_E[torch.randperm(shape.num_experts, generator=generator)]
        share_E = (share_E / share_E.sum()).cumsum(0)
        drawn_PN = torch.rand(shape.ranks, rows_per_rank, generator=generator, dtype=torch.float64)
        expert_PN = torch.searchsorted(share_E, drawn_PN).clamp(max=shape.num_experts - 1)
        rows_PE = torch.zeros(shape.ranks, shape.num_experts, dtype=torch.int64)
        rows_PE.scatter_add_(1, expert_PN, torch.ones_like(expert_PN))
        return cls(
            rows_PE=rows_PE if capacity is None else rows_PE.clamp(max=capacity),
            tokens=rows_per_rank if tokens is None else tokens,
            capacity=capacity,
        )

    def check(self, shape: LayerShape) -> None:
        """Refuse a workload of another layer.

        Raises:
            InputError: other numbers of ranks or experts.
        """
        wanted = shape.ranks, shape.num_experts
        if tuple(self.rows_PE.shape) != wanted:
            raise InputError(
                f"workload: rows_PE has shape {tuple(self.rows_PE.shape)}, of a layer with (ranks, experts) "
                f"= {wanted}"
            )
