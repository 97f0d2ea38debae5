"""The capacity rule, and the step from choices (T, K) to a routing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexpert import ops
from flexpert.core.context import RoutingContext
from flexpert.core.routing import CapacityRouting, Routing

from .weights import WeightRule


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The limit of one call.

    Attributes:
        limit: rows an expert keeps of one token group: a number, or an int64 tensor (groups,) where a mask
            makes it depend on data.
        bound: a plain number no smaller than any limit.
    """

    limit: int | Tensor
    bound: int


def capacity_of(
    capacity_factor: float | None, top_k: int, num_experts: int, context: RoutingContext, tokens: int
) -> Capacity | None:
    """The limit top_k * max(1, int(|capacity_factor| * ceil(T / E))).

    T is the number of tokens in a group, without padding tokens.

    Returns:
        The limit, or None where nothing can be dropped (dropless, or adaptive without an upper bound).
    """
    if capacity_factor is None or capacity_factor == 0:
        return None
    factor = abs(capacity_factor)
    per_group = tokens // context.num_groups
    bound = top_k * max(1, int(factor * math.ceil(per_group / num_experts)))
    if context.mask is None:
        return Capacity(limit=bound, bound=bound)
    real_G = context.mask.view(context.num_groups, -1).sum(1).double()
    limit_G = top_k * (factor * (real_G / num_experts).ceil()).floor().clamp(min=1)
    return Capacity(limit=limit_G.long(), bound=bound)


def assign(
    ids_TK: Tensor,
    weight_TK: Tensor,
    num_experts: int,
    *,
    context: RoutingContext,
    capacity: Capacity | None,
    priority_T: Tensor | None,
    trim: bool,
    **facts: Tensor | Mapping[str, Tensor] | None,
) -> Routing:
    """Group the choices of all tokens by expert and drop what exceeds the capacity.

    Every first choice outranks every second choice; within a choice the order is that of the tokens, or of
    descending `priority_T`.

    Args:
        ids_TK: int64, chosen experts in order of preference; E for none.
        weight_TK: their combine weights.
        capacity: rows an expert may keep of each token group; None for all.
        priority_T: higher goes first; None for order of arrival.
        trim: shorten N to the real rows; needs their number on the host.
        facts: further fields of the routing.
    """
    tokens = ids_TK.shape[0]
    groups = context.num_groups
    if priority_T is None:
        order_T = torch.arange(tokens, device=ids_TK.device)
    else:
        order_T = priority_T.argsort(descending=True, stable=True)
        ids_TK, weight_TK = ids_TK[order_T], weight_TK[order_T]
    group_T = order_T * groups // max(tokens, 1)
    key_N = (ids_TK * groups + group_T[:, None]).T.reshape(-1)
    bins = num_experts * groups
    limit_B = None if capacity is None else _limits(capacity, num_experts, groups, key_N)
    order_N, counts_B = ops.assign(key_N, bins, limit_B)
    counts_E = counts_B.view(num_experts, groups).sum(1)
    if trim:
        order_N = order_N[: int(counts_E.sum())]
    row_N = torch.arange(order_N.shape[0], device=order_N.device)
    weight_N = weight_TK.T.reshape(-1)[order_N]
    fields: dict[str, Any] = {
        "unit_N": order_T[order_N % max(tokens, 1)],
        "weight_N": weight_N if trim else weight_N.where(row_N < counts_E.sum(), 0.0),
        "counts_E": counts_E,
        "num_units": tokens,
        **facts,
    }
    if capacity is None or limit_B is None:
        return Routing(**fields)
    return CapacityRouting(
        **fields,
        slot_N=_slots(row_N, counts_B, groups, capacity.bound),
        capacity_E=limit_B.view(num_experts, groups).sum(1),
        buffer_capacity=capacity.bound * groups,
    )


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: str,
    weight_rule: WeightRule,
    capacity: Capacity | None,
    selection_bias: Tensor | None,
    prioritized: bool,
    aux: Mapping[str, Tensor],
) -> Routing:
    """Gate scores, the top_k best experts, weights and `assign` in one operator, for one token group.

    Args:
        logits_TE: the scores' input; every expert may be chosen, every token is real.
        top_k: K.
        scoring: one of `ops.SCORINGS`.
        weight_rule: without straight_through.
        capacity: of a plain number.
        selection_bias: (E,), added to the scores for the choice.
        prioritized: tokens of higher best score go first.
        aux: of the routing, where the choices are added.
    """
    limit = None if capacity is None else capacity.bound
    routes = ops.route(
        logits_TE,
        top_k,
        scoring,
        bias_E=selection_bias,
        normalize=weight_rule.normalizes(top_k),
        scale=weight_rule.scale,
        limit=limit,
        prioritized=prioritized,
    )
    fields: dict[str, Any] = {
        "unit_N": routes.unit_N,
        "weight_N": routes.weight_N,
        "counts_E": routes.counts_E,
        "num_units": logits_TE.shape[0],
        "logits_TE": logits_TE,
        "probs_TE": routes.score_TE,
        "aux": {"ids_TK": routes.ids_TK, **aux},
    }
    if limit is None:
        return Routing(**fields)
    return CapacityRouting(
        **fields,
        slot_N=routes.slot_N,
        capacity_E=torch.full_like(routes.counts_E, limit),
        buffer_capacity=limit,
    )


def _limits(capacity: Capacity, num_experts: int, groups: int, like: Tensor) -> Tensor:
    """The limit of each (expert, group), int64 (E * groups,)."""
    if isinstance(capacity.limit, int):
        return torch.full((num_experts * groups,), capacity.limit, dtype=torch.int64, device=like.device)
    return capacity.limit.repeat(num_experts)


def _slots(row_N: Tensor, counts_B: Tensor, groups: int, bound: int) -> Tensor:
    """The place of each row in its expert's buffer, where each token group has `bound` places of its own."""
    ends_B = counts_B.cumsum(0)
    bin_N = torch.searchsorted(ends_B, row_N, right=True).clamp(max=counts_B.shape[0] - 1)
    return bin_N % groups * bound + row_N - (ends_B - counts_B)[bin_N]
