"""Soft MoE: slots of mixed tokens in place of a selection (Puigcerver et al., arXiv 2308.00951)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.core.autocast import without_autocast
from flexpert.core.config import MoEConfig, require_bool, require_int
from flexpert.core.context import RoutingContext
from flexpert.core.errors import InputError
from flexpert.core.registry import ROUTERS, check_options, keyword_names
from flexpert.core.routing import DenseRouting
from flexpert.core.seeding import Constant

from .base import Router
from .overrides import refuse, refuse_settings
from .scores import add_normal_weight, routing_dtype


class SoftRouter(Router):
    """Each slot reads a softmax mixture of its sequence's tokens; each token a softmax mixture of all slots.

    Sequences are mixed apart from each other; an input of shape (T, D) is one sequence per token group. Every
    token of a sequence sees every other one: not for autoregressive models.

    Args:
        model_dim: D.
        num_experts: E.
        slots_per_expert: P / E.
        normalize: take the logits on unit vectors with a learned scale (section 2.3), for wide models.
    """

    dense = True
    weight: nn.Parameter

    def __init__(
        self, *, model_dim: int, num_experts: int, slots_per_expert: int = 1, normalize: bool = True
    ) -> None:
        super().__init__(model_dim=model_dim, num_experts=num_experts)
        require_int("slots_per_expert", slots_per_expert, least=1)
        require_bool("normalize", normalize)
        self.slots_per_expert, self.normalize = slots_per_expert, normalize
        add_normal_weight(self, (num_experts * slots_per_expert, model_dim), model_dim**-0.5)
        self.scale = nn.Parameter(torch.ones(())) if normalize else None
        self.initial["scale"] = Constant(1.0)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> DenseRouting:
        """Route T tokens; see `Router.forward`."""
        refuse(context, "soft routing", "top_k", "capacity_factor", "expert_mask", "ranks")
        tokens = x_TD.shape[0]
        group = tokens // context.num_groups
        length = context.sequence_length or max(group, 1)
        if group % length:
            raise InputError(f"sequence_length={length} does not divide the {group} tokens of a token group")
        with without_autocast(x_TD.device):
            logits_TP = self._logits(x_TD)
            logits_BSP = logits_TP.view(-1, length, logits_TP.shape[-1])
            dispatch_BSP, combine_BSP = _mixtures(logits_BSP, context.mask)
        rows = logits_BSP.shape[0] * self.slots_per_expert
        per_expert_TEP = combine_BSP.reshape(tokens, self.num_experts, self.slots_per_expert)
        return DenseRouting(
            dispatch_BSP=dispatch_BSP,
            combine_BSP=combine_BSP,
            counts_E=torch.full((self.num_experts,), rows, dtype=torch.int64, device=x_TD.device),
            num_units=tokens,
            probs_TE=per_expert_TEP.sum(-1),
        )

    def flops_per_token(self) -> int:
        """Logits, dispatch and combine: 6 D P."""
        return 6 * self.weight.numel()

    def _logits(self, x_TD: Tensor) -> Tensor:
        dtype = routing_dtype(x_TD.dtype)
        x_TD, weight_PD = x_TD.to(dtype), self.weight.to(dtype)
        if self.scale is None:
            return F.linear(x_TD, weight_PD)
        return F.linear(F.normalize(x_TD, dim=-1), self.scale.to(dtype) * F.normalize(weight_PD, dim=-1))


def _mixtures(logits_BSP: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over tokens (dispatch) and over slots (combine); padding tokens have no part in either."""
    combine_BSP = logits_BSP.softmax(2)
    if mask is None:
        return logits_BSP.softmax(1), combine_BSP
    real_BS1 = mask.view(logits_BSP.shape[:2]).unsqueeze(-1)
    lowest = torch.finfo(logits_BSP.dtype).min
    dispatch_BSP = logits_BSP.masked_fill(~real_BS1, lowest).softmax(1)
    return dispatch_BSP.masked_fill(~real_BS1, 0.0), combine_BSP.masked_fill(~real_BS1, 0.0)


@ROUTERS.register("soft")
def soft(config: MoEConfig, **options: Any) -> Router:
    """Soft MoE; see `SoftRouter` for the options."""
    names = set(keyword_names(SoftRouter)) - {"model_dim", "num_experts"}
    check_options("router 'soft'", options, names)
    refuse_settings(config, "soft", "capacity_factor", "batch_prioritized", "renormalize")
    return SoftRouter(model_dim=config.model_dim, num_experts=config.num_experts, **options)
