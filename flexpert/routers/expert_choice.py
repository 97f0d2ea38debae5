"""Expert choice: each expert takes its tokens (Zhou et al., arXiv 2202.09368)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexpert.core.autocast import without_autocast
from flexpert.core.config import MoEConfig, check_capacity_factor, check_top_k
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError, FlexpertError, InputError
from flexpert.core.registry import ROUTERS, check_options, keyword_names, suggest
from flexpert.core.routing import CapacityRouting
from flexpert.core.unset import pick

from .base import Router
from .capacity import capacity_of
from .overrides import allowed_experts, refuse, refuse_settings, rule_out
from .scores import CosineScore, LinearScore, check_scoring, scoring


class ExpertChoiceRouter(Router):
    """Each expert takes the tokens that score highest for it: balanced by construction.

    A token may get any number of experts, 0 included. The choice looks at all tokens of a group, later ones
    too: not for autoregressive models.

    Args:
        model_dim: D.
        num_experts: E.
        top_k: mean number of experts per token at capacity_factor 1.
        capacity_factor: tokens per expert and group = top_k * max(1, int(capacity_factor * ceil(T / E))), at
            most the group; None means 1.
        scoring: gate scores from logits, over the experts of a token.
    """

    def __init__(
        self,
        *,
        model_dim: int,
        num_experts: int,
        top_k: int = 1,
        capacity_factor: float | None = None,
        scoring: str = "softmax",
    ) -> None:
        super().__init__(model_dim=model_dim, num_experts=num_experts)
        check_scoring(scoring)
        check_top_k(top_k, num_experts)
        self.top_k, self.scoring = top_k, scoring
        self.capacity_factor = _positive(capacity_factor, ConfigError)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> CapacityRouting:
        """Route T tokens; see `Router.forward`."""
        tokens, groups = x_TD.shape[0], context.num_groups
        refuse(context, "expert choice", "ranks")
        top_k = pick(context.top_k, self.top_k)
        check_top_k(top_k, self.num_experts, InputError)
        factor = _positive(pick(context.capacity_factor, self.capacity_factor), InputError)
        with without_autocast(x_TD.device):
            logits_TE = self.score(x_TD, context)
            allowed = allowed_experts(context, logits_TE)
            logits_TE = rule_out(logits_TE, allowed)
            score_TE = scoring(self.scoring, logits_TE)
        capacity = capacity_of(factor, top_k, self.num_experts, context, tokens)
        assert capacity is not None
        may_TE = _may_take(score_TE, allowed, context.mask)
        ids_EGC = _top_tokens(score_TE.detach(), groups, min(capacity.bound, tokens // groups), may_TE)
        limit_G = torch.as_tensor(capacity.limit, device=x_TD.device).expand(groups)
        place_C = torch.arange(ids_EGC.shape[-1], device=x_TD.device)
        keep_EGC = (place_C < limit_G[None, :, None]).expand(ids_EGC.shape)
        if may_TE is not None:
            keep_EGC = keep_EGC & may_TE.T.gather(1, ids_EGC.flatten(1)).view(ids_EGC.shape)
        base_G1 = torch.arange(groups, device=x_TD.device)[:, None] * capacity.bound
        order_N = (~keep_EGC).flatten().to(torch.uint8).argsort(stable=True)  # kept rows first
        weight_EGC = score_TE.T.gather(1, ids_EGC.flatten(1))
        return CapacityRouting(
            unit_N=ids_EGC.flatten()[order_N],
            weight_N=weight_EGC.flatten()[order_N].where(keep_EGC.flatten()[order_N], 0.0),
            counts_E=keep_EGC.sum((1, 2)),
            num_units=tokens,
            logits_TE=logits_TE,
            probs_TE=score_TE,
            slot_N=(base_G1 + place_C).expand(ids_EGC.shape).flatten()[order_N],
            capacity_E=limit_G.sum().expand(self.num_experts),
            buffer_capacity=capacity.bound * groups,
        )


def _may_take(score_TE: Tensor, allowed: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """bool (T, E): what an expert may take: no padding token, and none that it is ruled out for."""
    if mask is None:
        return None if allowed is None else allowed.expand(score_TE.shape)
    return (mask[:, None] if allowed is None else mask[:, None] & allowed).expand(score_TE.shape)


def _top_tokens(ranking_TE: Tensor, groups: int, taken: int, may_TE: Tensor | None) -> Tensor:
    """The best `taken` tokens of each (expert, group), int64 (E, G, C); those it may not take come last."""
    tokens, num_experts = ranking_TE.shape
    if may_TE is not None:
        ranking_TE = ranking_TE.masked_fill(~may_TE, float("-inf"))
    size = tokens // groups
    ranking_EGS = ranking_TE.T.reshape(num_experts, groups, size)
    ids_EGC = ranking_EGS.topk(taken, dim=-1).indices
    return ids_EGC + size * torch.arange(groups, device=ids_EGC.device)[None, :, None]


def _positive(capacity_factor: float | None, error: type[FlexpertError]) -> float:
    check_capacity_factor(capacity_factor, error)
    if capacity_factor is None:
        return 1.0
    if capacity_factor <= 0:
        raise error(
            f"capacity_factor={capacity_factor!r}: expert choice fills its experts; "
            f"expected a number > 0, or None for 1"
        )
    return capacity_factor


class LinearExpertChoice(LinearScore, ExpertChoiceRouter):
    """Expert choice by a linear score."""


class CosineExpertChoice(CosineScore, ExpertChoiceRouter):
    """Expert choice by cosine similarity."""


@ROUTERS.register("expert_choice")
def expert_choice(config: MoEConfig, *, score: str = "linear", **options: Any) -> Router:
    """Expert choice on the score "linear" or "cosine"; see `ExpertChoiceRouter` for the options."""
    kinds = {"linear": (LinearExpertChoice, LinearScore), "cosine": (CosineExpertChoice, CosineScore)}
    if score not in kinds:
        raise ConfigError(f"unknown score {score!r}: {suggest(score, kinds)}")
    kind, part = kinds[score]
    names = {*keyword_names(part), *keyword_names(ExpertChoiceRouter)} - {"model_dim", "num_experts"}
    check_options("router 'expert_choice'", options, {*names, "score"})
    refuse_settings(config, "expert_choice", "batch_prioritized", "renormalize")
    rules = {"top_k": config.top_k, "capacity_factor": config.capacity_factor, **options}
    return kind(model_dim=config.model_dim, num_experts=config.num_experts, **rules)
