"""What a routing did, in numbers that a monitor can write, plot and merge."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .context import RoutingContext
from .routing import AnyRouting, CapacityRouting, DenseRouting

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """Values of one call of one layer; tensors, so that reading them costs no synchronisation until needed.

    Attributes:
        load_E: rows each expert computed (fp32).
        selected_E: rows each expert was chosen for, before drops (fp32).
        tokens: real tokens (padding tokens excluded).
        dropped: assignments dropped at capacity.
        entropy: mean entropy of the tokens' gate distribution, in nats; 0 where the router has none.
        max_violation: most loaded expert over the mean load, minus 1 (Wang et al., arXiv 2408.15664), from
            `selected_E`; 0 at perfect balance and without tokens.
        capacity: rows all experts may keep together; 0 where there is no limit.
    """

    load_E: Tensor
    selected_E: Tensor
    tokens: Tensor
    dropped: Tensor
    entropy: Tensor
    max_violation: Tensor
    capacity: Tensor

    @property
    def drop_rate(self) -> Tensor:
        """Dropped share of all assignments."""
        return self.dropped / self.selected_E.sum().clamp(min=1)


@torch.no_grad()
def reduce_stats(
    stats: Mapping[Key, RoutingStats], all_reduce: Callable[[Tensor], Tensor]
) -> dict[Key, RoutingStats]:
    """Statistics of a batch from those of its parts on several ranks, by one reduction for all layers.

    Args:
        stats: of this rank, the same layers in the same order on each; its part may be empty.
        all_reduce: the sum of a tensor over the ranks that share the batch.

    Returns:
        Of the whole batch, the same on every rank: rows, choices, tokens, drops and capacity summed, entropy
        as the mean over all tokens, the violation of the summed choices.
    """
    if not stats:
        return {}
    sums = [_to_sums(part) for part in stats.values()]
    totals = all_reduce(torch.cat(sums)).split([part.numel() for part in sums])
    return {key: _from_sums(total) for key, total in zip(stats, totals, strict=True)}


@torch.no_grad()
def merge_stats(parts: Sequence[RoutingStats]) -> RoutingStats:
    """Statistics of a batch from those of its parts in one process: at least one, of one layer."""
    return _from_sums(torch.stack([_to_sums(part) for part in parts]).sum(0))


def selected_counts(routing: AnyRouting, num_sequences: int = 1) -> Tensor:
    """Choices per sequence and expert before drops, fp32 (B, E); tokens are cut into B equal sequences."""
    num_experts = routing.num_experts
    if "ids_TK" in routing.aux:
        ids_BN = routing.aux["ids_TK"].reshape(num_sequences, -1)
        counts = torch.zeros(num_sequences, num_experts + 1, device=ids_BN.device)
        ones = torch.ones((), device=ids_BN.device).expand(ids_BN.shape)
        return counts.scatter_add_(1, ids_BN, ones)[:, :num_experts]
    if isinstance(routing, DenseRouting):
        return (routing.counts_E / num_sequences).float().expand(num_sequences, -1)
    sequence_N = routing.unit_N * num_sequences // max(routing.num_units, 1)
    index_N = sequence_N * (num_experts + 1) + routing.expert_N()
    flat = torch.zeros(num_sequences * (num_experts + 1), device=index_N.device)
    flat = flat.scatter_add_(0, index_N, torch.ones_like(index_N, dtype=flat.dtype))
    return flat.view(num_sequences, -1)[:, :num_experts]


def _to_sums(stats: RoutingStats) -> Tensor:
    """(2 E + 4,) values that add up over the parts of a batch."""
    entropy = stats.entropy * stats.tokens
    scalars = torch.stack([stats.tokens, stats.dropped, stats.capacity, entropy])
    return torch.cat([stats.load_E, stats.selected_E, scalars])


def _from_sums(sums: Tensor) -> RoutingStats:
    tokens, dropped, capacity, entropy = sums[-4:]
    load_E, selected_E = sums[:-4].chunk(2)
    return RoutingStats(
        load_E=load_E,
        selected_E=selected_E,
        tokens=tokens,
        dropped=dropped,
        entropy=entropy / tokens.clamp(min=1),
        max_violation=_violation(selected_E),
        capacity=capacity,
    )


def _violation(selected_E: Tensor) -> Tensor:
    mean = selected_E.mean()
    return torch.where(mean > 0, selected_E.max() / mean.clamp(min=1e-20) - 1, 0.0)


@torch.no_grad()
def measure(routing: AnyRouting, context: RoutingContext) -> RoutingStats:
    """The statistics of one routing; O(T E), no synchronisation with the host."""
    load_E = routing.counts_E.float()
    selected_E = selected_counts(routing)[0]
    zero = load_E.new_zeros(())
    if context.mask is None:
        tokens = zero + routing.num_units
    else:
        tokens = context.mask.sum().float()
    entropy = zero
    if routing.probs_TE is not None:
        p_TE = routing.probs_TE.float()
        p_TE = p_TE / p_TE.sum(-1, keepdim=True).clamp(min=1e-20)
        entropy_T = torch.special.entr(p_TE).sum(-1)
        if context.mask is not None:
            entropy_T = torch.where(context.mask, entropy_T, 0.0)
        entropy = entropy_T.sum() / tokens.clamp(min=1)
    capacity = routing.capacity_E.sum().float() if isinstance(routing, CapacityRouting) else zero
    dropped = (selected_E.sum() - load_E.sum()).clamp(min=0)
    return RoutingStats(
        load_E=load_E,
        selected_E=selected_E,
        tokens=tokens,
        dropped=dropped,
        entropy=entropy,
        max_violation=_violation(selected_E),
        capacity=capacity,
    )
