"""Entropy of the gate (Huang et al., arXiv 2403.07652, eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.registry import LOSSES
from flexpert.core.routing import AnyRouting

from .common import probs_of, real


@LOSSES.register("entropy")
def entropy(routing: AnyRouting, context: RoutingContext) -> Tensor:
    """Mean over tokens of -sum_e p log p, in nats, p being normalised to 1; 0 without tokens.

    Minimised, it makes gates decided, and top-p routing use fewer experts.
    """
    probs_TE = probs_of(routing, "entropy")
    share_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp(min=1e-20)
    # The slope of p log p is infinite at 0, where a softmax underflows and at experts that are ruled out.
    share_TE = share_TE.clamp(min=torch.finfo(share_TE.dtype).tiny)
    values_T, count = real(torch.special.entr(share_TE).sum(-1), context)
    return values_T.sum() / count
