"""Router z-loss (Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.registry import LOSSES
from flexpert.core.routing import AnyRouting

from .common import BATCH_SCOPES, logits_of, mean_over_tokens, with_scopes


@LOSSES.register("z")
@with_scopes(BATCH_SCOPES)
def z_loss(routing: AnyRouting, context: RoutingContext, *, scope: str = "micro_batch") -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps logits small. 0 without tokens.

    A token without any expert to choose from adds 0.

    Args:
        scope: "micro_batch", or "global": over the tokens of all ranks.
    """
    logits_TE = logits_of(routing, "z")
    nobody_T = logits_TE.detach().amax(-1) == torch.finfo(logits_TE.dtype).min
    values_T = logits_TE.logsumexp(-1).masked_fill(nobody_T, 0.0).square()
    return mean_over_tokens(values_T, scope, context)
