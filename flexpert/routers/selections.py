"""Selection rules: a ranking of experts per token to the experts chosen.

A selection is called with (ranking_TE, top_k, context, key) and returns ids_TK int64 in order of preference,
E for "no expert". `key()` draws the call's random key, for rules that need noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError, InputError

from . import noise

Key = Callable[[], Tensor]


def best(ranking_TE: Tensor, top_k: int, context: RoutingContext) -> Tensor:
    """The top_k best experts (T, K), or those at the positions `context.ranks` of the order."""
    if context.ranks is None:
        return ranking_TE.topk(top_k, dim=-1).indices
    num_experts = ranking_TE.shape[-1]
    if not context.ranks or min(context.ranks) < 0 or max(context.ranks) >= num_experts:
        raise InputError(f"ranks={context.ranks}: expected one or more positions in 0..{num_experts - 1}")
    order_TK = ranking_TE.topk(max(context.ranks) + 1, dim=-1).indices
    return order_TK[:, list(context.ranks)]


@dataclass(frozen=True)
class TopK:
    """The K best experts of each token."""

    variable: bool = False

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, K)."""
        return best(ranking_TE, top_k, context)


class TopP:
    """The fewest best experts whose scores sum to more than p (Huang et al., arXiv 2403.07652).

    An expert is kept while the scores before it sum to at most p; at least one and at most `max_k` are.
    """

    variable = True

    def __init__(self, *, p: float = 0.4, max_k: int | None = None) -> None:
        if not p >= 0:
            raise ConfigError(f"p={p!r}: expected a probability mass >= 0")
        if max_k is not None and max_k < 1:
            raise ConfigError(f"max_k={max_k!r}: expected None or an integer >= 1")
        self.p, self.max_k = p, max_k

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, max_k)."""
        num_experts = ranking_TE.shape[-1]
        score_TE, ids_TE = ranking_TE.sort(dim=-1, descending=True, stable=True)
        before_TE = score_TE.cumsum(-1) - score_TE
        keep_TE = (before_TE <= self.p) | (torch.arange(num_experts, device=ids_TE.device) == 0)
        return ids_TE.masked_fill(~keep_TE, num_experts)[:, : self.max_k]


class Threshold:
    """Every expert whose score exceeds the threshold, but no fewer than `min_k`."""

    variable = True

    def __init__(self, *, threshold: float, min_k: int = 1) -> None:
        if min_k < 0:
            raise ConfigError(f"min_k={min_k!r}: expected an integer >= 0")
        self.threshold, self.min_k = threshold, min_k

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, E)."""
        num_experts = ranking_TE.shape[-1]
        score_TE, ids_TE = ranking_TE.sort(dim=-1, descending=True, stable=True)
        first_E = torch.arange(num_experts, device=ids_TE.device) < self.min_k
        return ids_TE.masked_fill(~((score_TE > self.threshold) | first_E), num_experts)


class GroupLimited:
    """Top-k within the best groups of experts (DeepSeek-V2 and V3, arXiv 2412.19437, section 2.1.2).

    Experts are cut into `groups` equal groups; a group's score is the sum of its `group_top` best scores; the
    `groups_kept` best groups remain.
    """

    variable = False

    def __init__(self, *, groups: int, groups_kept: int, group_top: int = 2) -> None:
        if not 1 <= groups_kept <= groups or group_top < 1:
            raise ConfigError(
                f"groups={groups!r}, groups_kept={groups_kept!r}, group_top={group_top!r}: expected "
                f"1 <= groups_kept <= groups and group_top >= 1"
            )
        self.groups, self.groups_kept, self.group_top = groups, groups_kept, group_top

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise `ConfigError` unless the groups divide the experts and hold top_k of them."""
        if num_experts % self.groups:
            raise ConfigError(f"groups={self.groups} does not divide num_experts={num_experts}")
        if top_k > self.groups_kept * (num_experts // self.groups):
            raise ConfigError(
                f"top_k={top_k} exceeds the {num_experts // self.groups} experts of "
                f"groups_kept={self.groups_kept} groups; keep more groups"
            )

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, K)."""
        tokens, num_experts = ranking_TE.shape
        self.check(num_experts, top_k)
        ranking_TGE = ranking_TE.view(tokens, self.groups, num_experts // self.groups)
        score_TG = ranking_TGE.topk(min(self.group_top, ranking_TGE.shape[-1]), dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(score_TG, dtype=torch.bool)
        kept_TG = kept_TG.scatter(1, score_TG.topk(self.groups_kept, dim=-1).indices, True)
        limited_TGE = ranking_TGE.masked_fill(~kept_TG[..., None], float("-inf"))
        return best(limited_TGE.view(tokens, num_experts), top_k, context)


@dataclass(frozen=True)
class Random:
    """K different experts at random, whatever the scores."""

    variable: bool = False

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, K)."""
        tokens, num_experts = ranking_TE.shape
        random_TE = noise.uniform(key(), noise.counters(tokens, num_experts, ranking_TE.device))
        return best(random_TE.masked_fill(ranking_TE == float("-inf"), -1.0), top_k, context)


@dataclass(frozen=True)
class Balanced:
    """The experts in turn, whatever the scores: loads differ by at most one. For benchmarks and debugging."""

    variable: bool = False

    def __call__(self, ranking_TE: Tensor, top_k: int, context: RoutingContext, key: Key) -> Tensor:
        """ids (T, K)."""
        tokens, num_experts = ranking_TE.shape
        return noise.counters(tokens, top_k, ranking_TE.device) % num_experts


SELECTIONS = {
    "top_k": TopK,
    "top_p": TopP,
    "threshold": Threshold,
    "group_limited": GroupLimited,
    "random": Random,
    "balanced": Balanced,
}
