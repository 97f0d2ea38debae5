"""Selection rules: a ranking of experts per token to the experts chosen.

A selection is called with (ranking_TE, top_k, context, key) and returns ids_TK int64 in order of preference,
E for "no expert". `key()` draws the call's random key, for rules that need noise. A ranking of -inf stands
for an expert that may not be chosen; a rule that finds no other may name it, and the router leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexpert.core.config import require_int, require_number
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError, FlexpertError, InputError

from . import noise
from .overrides import refuse

Key = Callable[[], Tensor]


def best(ranking_TE: Tensor, top_k: int, context: RoutingContext) -> Tensor:
    """The top_k best experts (T, K), or those at the positions `context.ranks` of the order."""
    if context.ranks is None:
        return ranking_TE.topk(top_k, dim=-1).indices
    num_experts = ranking_TE.shape[-1]
    valid = set(range(num_experts))
    if not context.ranks or len(set(context.ranks) & valid) < len(context.ranks):
        raise InputError(f"ranks={context.ranks}: expected different positions in 0..{num_experts - 1}")
    order_TK = ranking_TE.topk(max(context.ranks) + 1, dim=-1).indices
    return order_TK[:, list(context.ranks)]


class Selection:
    """A selection rule.

    Attributes:
        variable: tokens may get different numbers of experts.
    """

    variable = False

    def check(self, num_experts: int, top_k: int, error: type[FlexpertError]) -> None:
        """Raise the error where the rule cannot give top_k of num_experts."""


class TopK(Selection):
    """The K best experts of each token."""

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, K)."""
        return best(ranking_TE, top_k, context)


class TopP(Selection):
    """The fewest best experts whose scores sum to more than p (Huang et al., arXiv 2403.07652).

    An expert is kept while the scores before it sum to at most p; at least one and at most `max_k` are.
    With p >= 1 all are.
    """

    variable = True

    def __init__(self, *, p: float = 0.4, max_k: int | None = None) -> None:
        require_number("p", p, least=0)
        if max_k is not None:
            require_int("max_k", max_k, least=1)
        self.p, self.max_k = p, max_k

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, max_k)."""
        refuse(context, "selection 'top_p'", "ranks")
        num_experts = ranking_TE.shape[-1]
        score_TE, ids_TE = ranking_TE.sort(dim=-1, descending=True, stable=True)
        if self.p < 1:  # else rounding of the sum might leave out the last
            before_TE = score_TE.cumsum(-1) - score_TE
            keep_TE = (before_TE <= self.p) | (torch.arange(num_experts, device=ids_TE.device) == 0)
            ids_TE = ids_TE.masked_fill(~keep_TE, num_experts)
        return ids_TE[:, : self.max_k]


class Threshold(Selection):
    """Every expert whose score exceeds the threshold, but no fewer than `min_k`."""

    variable = True

    def __init__(self, *, threshold: float, min_k: int = 1) -> None:
        require_number("threshold", threshold)
        require_int("min_k", min_k, least=0)
        self.threshold, self.min_k = threshold, min_k

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, E)."""
        refuse(context, "selection 'threshold'", "ranks")
        num_experts = ranking_TE.shape[-1]
        score_TE, ids_TE = ranking_TE.sort(dim=-1, descending=True, stable=True)
        first_E = torch.arange(num_experts, device=ids_TE.device) < self.min_k
        return ids_TE.masked_fill(~((score_TE > self.threshold) | first_E), num_experts)


class GroupLimited(Selection):
    """Top-k within the best groups of experts (DeepSeek-V2 and V3, arXiv 2412.19437, section 2.1.2).

    Experts are cut into `groups` equal groups; a group's score is the sum of its `group_top` best scores; the
    `groups_kept` best groups remain. Experts that may not be chosen have no part in a group's score.
    """

    def __init__(self, *, groups: int, groups_kept: int, group_top: int = 2) -> None:
        for name, value in (("groups", groups), ("groups_kept", groups_kept), ("group_top", group_top)):
            require_int(name, value, least=1)
        if groups_kept > groups:
            raise ConfigError(f"groups_kept={groups_kept} exceeds groups={groups}")
        self.groups, self.groups_kept, self.group_top = groups, groups_kept, group_top

    def check(self, num_experts: int, top_k: int, error: type[FlexpertError]) -> None:
        """Raise the error unless the groups divide the experts and those kept hold top_k of them."""
        if num_experts % self.groups:
            raise error(f"groups={self.groups} does not divide num_experts={num_experts}")
        held = self.groups_kept * (num_experts // self.groups)
        if top_k > held:
            raise error(f"top_k={top_k} exceeds the {held} experts of groups_kept={self.groups_kept} groups")

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, K)."""
        tokens, num_experts = ranking_TE.shape
        self.check(
            num_experts, top_k if context.ranks is None else max(context.ranks, default=0) + 1, InputError
        )
        ranking_TGE = ranking_TE.view(tokens, self.groups, num_experts // self.groups)
        best_TGE = ranking_TGE.topk(min(self.group_top, ranking_TGE.shape[-1]), dim=-1).values
        absent_TGE = best_TGE == float("-inf")
        score_TG = best_TGE.masked_fill(absent_TGE, 0.0).sum(-1)
        score_TG = score_TG.masked_fill(absent_TGE.all(-1), float("-inf"))
        kept_TG = torch.zeros_like(score_TG, dtype=torch.bool)
        kept_TG = kept_TG.scatter(1, score_TG.topk(self.groups_kept, dim=-1).indices, True)
        limited_TE = ranking_TGE.masked_fill(~kept_TG[..., None], float("-inf")).view(tokens, num_experts)
        ids_TK = best(limited_TE, top_k, context)
        return ids_TK.masked_fill(limited_TE.gather(1, ids_TK) == float("-inf"), num_experts)


class Random(Selection):
    """K different experts at random, whatever the scores."""

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, K)."""
        tokens, num_experts = ranking_TE.shape
        first = context.first_token(tokens)
        random_TE = noise.uniform(key(), noise.counters(tokens, num_experts, ranking_TE.device, first))
        return best(random_TE.masked_fill(ranking_TE == float("-inf"), -1.0), top_k, context)


class Balanced(Selection):
    """The experts in turn, whatever the scores: loads differ by at most one. For benchmarks and debugging."""

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, K)."""
        refuse(context, "selection 'balanced'", "ranks")
        tokens, num_experts = ranking_TE.shape
        return noise.counters(tokens, top_k, ranking_TE.device, context.first_token(tokens)) % num_experts


SELECTIONS = {
    "top_k": TopK,
    "top_p": TopP,
    "threshold": Threshold,
    "group_limited": GroupLimited,
    "random": Random,
    "balanced": Balanced,
}
