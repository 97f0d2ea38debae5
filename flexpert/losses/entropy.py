"""Entropy of the gate (Huang et al., arXiv 2403.07652, eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.registry import LOSSES
from flexpert.core.routing import AnyRouting

from .common import BATCH_SCOPES, mean_over_tokens, probs_of, with_scopes


@LOSSES.register("entropy")
@with_scopes(BATCH_SCOPES)
def entropy(routing: AnyRouting, context: RoutingContext, *, scope: str = "micro_batch") -> Tensor:
    """Mean over tokens of -sum_e p log p, in nats, p being normalised to 1; 0 without tokens.

    Minimised, it makes gates decided, and top-p routing use fewer experts.

    Args:
        scope: "micro_batch", or "global": over the tokens of all ranks.
    """
    probs_TE = probs_of(routing, "entropy")
    share_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp(min=1e-20)
    # The slope of p log p is infinite at 0, where a softmax underflows and at experts that are ruled out.
    share_TE = share_TE.clamp(min=torch.finfo(share_TE.dtype).tiny)
    return mean_over_tokens(torch.special.entr(share_TE).sum(-1), scope, context)
