"""Router z-loss (Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5)."""

from __future__ import annotations

from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.registry import LOSSES
from flexpert.core.routing import AnyRouting

from .common import logits_of, real


@LOSSES.register("z")
def z_loss(routing: AnyRouting, context: RoutingContext) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps logits small. 0 without tokens."""
    values_T, count = real(logits_of(routing, "z").logsumexp(-1).square(), context)
    return values_T.sum() / count
