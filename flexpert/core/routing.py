"""Who computes what: the value that a router returns and everything after it reads.

Letters: T tokens (units), E experts, N rows (assignments of a unit to an expert), P slots (soft routing),
B sequences, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, kw_only=True)
class Routing:
    """A ragged list of assignments, grouped by expert.

    The first `counts_E.sum()` rows are real: those of expert 0, then those of expert 1, ..., each expert's in
    order of priority. Rows past them (dropped or absent assignments; they keep N static) have weight 0 and
    are never read.

    Attributes:
        unit_N: int64, the unit whose row this is.
        weight_N: fp32 (fp64 for fp64 input), differentiable combine weight.
        counts_E: int64, rows of each expert.
        num_units: T, the number of units routed.
        unit_kind: what a unit is: token, sequence, sample, graph or prompt.
        logits_TE, probs_TE: what the selection was made from (noise included), where the router has them.
        state: named tensors for later layers, handed on through `RoutingContext.state`.
        aux: named tensors for losses and statistics; `ids_TK` are the choices before any drop (E = none).
    """

    unit_N: Tensor
    weight_N: Tensor
    counts_E: Tensor
    num_units: int
    unit_kind: str = "token"
    logits_TE: Tensor | None = None
    probs_TE: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    aux: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """E, experts that could be chosen."""
        return self.counts_E.shape[0]

    def expert_N(self) -> Tensor:
        """int64 (N,): the expert of each row; E for rows past the real ones."""
        rows = torch.arange(self.unit_N.shape[0], device=self.counts_E.device)
        return torch.searchsorted(self.counts_E.cumsum(0), rows, right=True)


@dataclass(frozen=True, kw_only=True)
class CapacityRouting(Routing):
    """A routing whose experts take a limited number of rows, so a padded buffer of static shape holds it.

    Attributes:
        slot_N: int64, the place of each real row inside its expert's buffer.
        capacity_E: int64, rows each expert may keep over all token groups.
        buffer_capacity: rows of one expert's buffer, a plain number known before routing; at least
            `capacity_E.max()` (padding tokens lower the capacity, not the buffer).
    """

    slot_N: Tensor
    capacity_E: Tensor
    buffer_capacity: int


@dataclass(frozen=True, kw_only=True)
class DenseRouting:
    """Soft routing: every slot reads a mixture of all tokens, every token a mixture of all slots.

    Slots are grouped by expert, P / E each. B token groups are mixed apart from each other.

    Attributes:
        dispatch_BSP: share of token s in slot p.
        combine_BSP: share of slot p in token s.
        counts_E: int64, rows of each expert (B * P / E).
        num_units: T = B * S.
    """

    dispatch_BSP: Tensor
    combine_BSP: Tensor
    counts_E: Tensor
    num_units: int
    unit_kind: str = "token"
    logits_TE: Tensor | None = None
    probs_TE: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    aux: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """E, experts that could be chosen."""
        return self.counts_E.shape[0]


AnyRouting = Routing | DenseRouting

for _kind in (Routing, CapacityRouting, DenseRouting):
    pytree.register_dataclass(_kind)
