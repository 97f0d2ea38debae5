"""Load balance (GShard, arXiv 2006.16668, section 2.2; Switch, arXiv 2101.03961, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.errors import InputError
from flexpert.core.registry import LOSSES
from flexpert.core.routing import AnyRouting
from flexpert.core.stats import selected_counts

from .common import BATCH_SCOPES, SCOPES, check_scope, num_sequences, over_ranks, probs_of, real, with_scopes


@LOSSES.register("balance")
@with_scopes(SCOPES)
def balance(routing: AnyRouting, context: RoutingContext, *, scope: str = "micro_batch") -> Tensor:
    """E * sum_e (n_e / sum n) * P_e.

    n_e counts all K choices for expert e before any drop; P is the mean of the gate scores, normalised to 1
    per token; padding tokens have no part in either. 1.0 at perfect balance for every K, E when all tokens
    choose one expert with certainty, 0 without tokens.

    Args:
        scope: "micro_batch"; "sequence": computed within each sequence, then averaged over those with
            tokens (DeepSeek-V3, arXiv 2412.19437, eq. 17); or "global": n and P are those of the batch that
            all ranks share (Qiu et al., arXiv 2501.11873).
    """
    probs_TE = probs_of(routing, "balance")
    parts = num_sequences(scope, context, probs_TE.shape[0])
    return _balance(selected_counts(routing, parts), probs_TE, scope, context)


@LOSSES.register("balance_first_choice")
@with_scopes(BATCH_SCOPES)
def balance_first_choice(
    routing: AnyRouting, context: RoutingContext, *, scope: str = "micro_batch"
) -> Tensor:
    """The published form of GShard and Switch: as `balance`, with n_e counting first choices only.

    Args:
        scope: "micro_batch" or "global", as in `balance`.
    """
    check_scope(scope, BATCH_SCOPES)
    probs_TE = probs_of(routing, "balance_first_choice")
    if "ids_TK" not in routing.aux:
        raise InputError("loss 'balance_first_choice' needs a router in which tokens choose; use 'balance'")
    first_1T = routing.aux["ids_TK"][:, 0][None]
    counts = torch.zeros(1, routing.num_experts + 1, device=first_1T.device)
    counts_1E = counts.scatter_add_(1, first_1T, torch.ones_like(first_1T, dtype=counts.dtype))[:, :-1]
    return _balance(counts_1E, probs_TE, scope, context)


def _balance(counts_BE: Tensor, probs_TE: Tensor, scope: str, context: RoutingContext) -> Tensor:
    """The term of each part, averaged over the parts that have tokens."""
    parts, num_experts = counts_BE.shape
    counts_BE = counts_BE.to(probs_TE.dtype)
    share_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp(min=1e-20)
    share_TE, _ = real(share_TE, context)
    counts_BE, total_BE = over_ranks(scope, context, counts_BE, share_TE.view(parts, -1, num_experts).sum(1))
    chosen_B1 = counts_BE.sum(-1, keepdim=True)
    mean_BE = total_BE / total_BE.detach().sum(-1, keepdim=True).clamp(min=1e-20)
    terms_B = num_experts * (counts_BE / chosen_B1.clamp(min=1) * mean_BE).sum(-1)
    return terms_B.sum() / (chosen_B1 > 0).sum().clamp(min=1)
