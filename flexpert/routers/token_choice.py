"""Token choice: each token takes its experts. Score, selection, weight and capacity rules compose freely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert import ops
from flexpert.core.autocast import without_autocast
from flexpert.core.config import (
    MoEConfig,
    check_capacity_factor,
    check_top_k,
    require_bool,
    require_number,
)
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError, InputError
from flexpert.core.registry import ROUTERS, Spec, check_options, keyword_names, split_spec, suggest
from flexpert.core.routing import Routing
from flexpert.core.seeding import Constant, derive_seed, draw_base
from flexpert.core.unset import pick

from . import noise
from .base import Router
from .capacity import Capacity, assign, capacity_of, route
from .overrides import allowed_experts, rule_out
from .scores import CosineScore, HashScore, LinearScore, check_scoring, routing_dtype
from .scores import scoring as gate_scores
from .selections import SELECTIONS, TopK
from .weights import WeightRule


class TokenChoiceRouter(Router):
    """Each token takes the experts it ranks best.

    Score -> noise -> gate scores -> selection -> weights -> capacity. Subclasses give
    `score(x_TD, context) -> logits_TE`, themselves or by inheriting from a score function too.

    Args:
        model_dim: D.
        num_experts: E.
        top_k: K where the call gives none.
        scoring: gate scores from logits: softmax, sigmoid, sqrt_softplus or uniform (1; the logits rank).
        selection: name of a rule or {"name": ..., option: ...}: top_k, top_p, threshold, group_limited,
            random, balanced.
        renormalize, scale, straight_through: see `WeightRule`.
        capacity_factor, batch_prioritized: see `MoEConfig`.
        gate_noise: in training, logits += gate_noise / E * N(0, 1) (Riquelme et al., arXiv 2106.05974).
        learned_noise: in training, logits += softplus(x W_noise) * N(0, 1) (Shazeer et al., arXiv 1701.06538,
            eq. 4).
        input_jitter: in training, the router's input is multiplied by uniform values in 1 -/+ input_jitter
            (Fedus et al., arXiv 2101.03961).
        selection_bias: a buffer (E,) added to the gate scores for the selection only, moved by a balancer
            (Wang et al., arXiv 2408.15664); it stays in fp32 whatever the module is cast to.
    """

    def __init__(
        self,
        *,
        model_dim: int,
        num_experts: int,
        top_k: int = 1,
        scoring: str = "softmax",
        selection: Spec = "top_k",
        renormalize: bool | str = False,
        scale: float = 1.0,
        straight_through: bool = False,
        capacity_factor: float | None = None,
        batch_prioritized: bool = False,
        gate_noise: float = 0.0,
        learned_noise: bool = False,
        input_jitter: float = 0.0,
        selection_bias: bool = False,
    ) -> None:
        super().__init__(model_dim=model_dim, num_experts=num_experts)
        check_scoring(scoring)
        check_top_k(top_k, num_experts)
        check_capacity_factor(capacity_factor)
        for name, number in (("gate_noise", gate_noise), ("input_jitter", input_jitter)):
            require_number(name, number, least=0)
        for name, switch in (
            ("batch_prioritized", batch_prioritized),
            ("learned_noise", learned_noise),
            ("selection_bias", selection_bias),
        ):
            require_bool(name, switch)
        if learned_noise and gate_noise:
            raise ConfigError(f"gate_noise={gate_noise!r} and learned_noise=True: choose one of the two")
        self.top_k = top_k
        self.scoring = scoring
        self.selection = _build_selection(selection, num_experts, top_k)
        self.weight_rule = WeightRule(renormalize=renormalize, scale=scale, straight_through=straight_through)
        self.capacity_factor, self.batch_prioritized = capacity_factor, batch_prioritized
        self.gate_noise, self.input_jitter = gate_noise, input_jitter
        self.noise_weight = None
        if learned_noise:
            self.noise_weight = nn.Parameter(torch.zeros(num_experts, model_dim))
        self.selection_bias: Tensor | None
        self.register_buffer("selection_bias", torch.zeros(num_experts) if selection_bias else None)
        self.initial |= {"noise_weight": Constant(0.0), "selection_bias": Constant(0.0)}
        base = draw_base()
        self.seeds = {purpose: derive_seed(base, purpose) for purpose in ("gate", "jitter", "selection")}

    def _apply(self, fn: Any, recurse: bool = True) -> TokenChoiceRouter:
        """Keep the selection bias in fp32 when the module is cast: its steps vanish in half precision."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        moved = self.selection_bias
        if bias is not None and moved is not None and moved.dtype is not torch.float32:
            self.selection_bias = bias.to(moved.device)
        return self

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route T tokens; see `Router.forward`."""
        top_k, capacity_factor = self._settings(context)
        with without_autocast(x_TD.device):
            clean_TE, logits_TE, std = self._logits(x_TD, context)
            capacity = capacity_of(capacity_factor, top_k, self.num_experts, context, x_TD.shape[0])
            aux = {"clean_logits_TE": clean_TE, **({} if std is None else {"noise_std": std})}
            if not self._is_plain(context):
                return self._route_in_steps(logits_TE, top_k, capacity, aux, context)
            return route(
                logits_TE,
                top_k,
                scoring=self.scoring,
                weight_rule=self.weight_rule,
                capacity=capacity,
                selection_bias=self.selection_bias,
                prioritized=self.batch_prioritized,
                aux=aux,
            )

    def flops_per_token(self) -> int:
        """Those of the score, and of the learned noise."""
        extra = 0 if self.noise_weight is None else 2 * self.noise_weight.numel()
        return self.score_flops() + extra

    def _settings(self, context: RoutingContext) -> tuple[int, float | None]:
        top_k = pick(context.top_k, self.top_k)
        check_top_k(top_k, self.num_experts, InputError)
        capacity_factor = pick(context.capacity_factor, self.capacity_factor)
        check_capacity_factor(capacity_factor, InputError)
        return top_k if context.ranks is None else len(context.ranks), capacity_factor

    def _logits(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits without noise, with noise, and the noise's standard deviation where the router has any."""
        first = context.first_token(x_TD.shape[0])
        if self.training and self.input_jitter:
            key = noise.call_key(context, self.seeds["jitter"], x_TD.device)
            u_TD = noise.uniform(key, noise.counters(x_TD.shape[0], x_TD.shape[1], x_TD.device, first))
            x_TD = x_TD.to(routing_dtype(x_TD.dtype)) * (1 + self.input_jitter * (2 * u_TD - 1))
        clean_TE = self.score(x_TD, context)
        std: Tensor | None = None
        if self.noise_weight is not None:
            std = F.softplus(F.linear(x_TD.to(clean_TE.dtype), self.noise_weight.to(clean_TE.dtype)))
        elif self.gate_noise:
            std = clean_TE.new_full((), self.gate_noise / self.num_experts)
        if std is None or not self.training:
            return clean_TE, clean_TE, std
        key = noise.call_key(context, self.seeds["gate"], x_TD.device)
        noise_TE = noise.normal(key, noise.counters(clean_TE.shape[0], self.num_experts, x_TD.device, first))
        return clean_TE, clean_TE + std * noise_TE.to(clean_TE.dtype), std

    def _is_plain(self, context: RoutingContext) -> bool:
        """Whether one operator has all rules of this call."""
        return (
            type(self.selection) is TopK
            and self.scoring in ops.SCORINGS
            and not self.weight_rule.straight_through
            and context.mask is None
            and context.expert_mask is None
            and context.ranks is None
            and context.num_groups == 1
        )

    def _route_in_steps(
        self,
        logits_TE: Tensor,
        top_k: int,
        capacity: Capacity | None,
        aux: Mapping[str, Tensor],
        context: RoutingContext,
    ) -> Routing:
        """Any rules: scores, selection, weights and capacity one after the other."""
        allowed = allowed_experts(context, logits_TE)
        logits_TE = rule_out(logits_TE, allowed)
        score_TE = gate_scores(self.scoring, logits_TE)
        ids_TK = self._select(logits_TE, score_TE, allowed, top_k, context)
        weight_TK, ids_TK = self._weights(score_TE, ids_TK, allowed, context)
        trim = self.selection.variable or context.mask is not None
        return assign(
            ids_TK,
            weight_TK,
            self.num_experts,
            context=context,
            capacity=capacity,
            priority_T=score_TE.detach().amax(-1) if self.batch_prioritized else None,
            trim=trim and not torch.compiler.is_compiling(),
            logits_TE=logits_TE,
            probs_TE=score_TE,
            aux={"ids_TK": ids_TK, **aux},
        )

    def _select(
        self, logits_TE: Tensor, score_TE: Tensor, allowed: Tensor | None, top_k: int, context: RoutingContext
    ) -> Tensor:
        """Chosen experts (T, K) in order of preference; E for none."""
        ranking_TE = (logits_TE if self.scoring == "uniform" else score_TE).detach()
        if self.selection_bias is not None:
            ranking_TE = ranking_TE + self.selection_bias
        if allowed is not None:
            ranking_TE = ranking_TE.masked_fill(~allowed, float("-inf"))

        def key() -> Tensor:
            return noise.call_key(context, self.seeds["selection"], ranking_TE.device)

        return self.selection(ranking_TE, top_k, context, key)

    def _weights(
        self, score_TE: Tensor, ids_TK: Tensor, allowed: Tensor | None, context: RoutingContext
    ) -> tuple[Tensor, Tensor]:
        """Weights (T, K), and the ids, with E for experts that may not be chosen and for padding tokens."""
        last = self.num_experts - 1
        absent_TK = ids_TK > last
        if allowed is not None:
            absent_TK = absent_TK | ~allowed.expand(score_TE.shape).gather(1, ids_TK.clamp(max=last))
        if context.mask is not None:
            absent_TK = absent_TK | ~context.mask[:, None]
        chosen_TK = score_TE.gather(1, ids_TK.clamp(max=last)).masked_fill(absent_TK, 0.0)
        return self.weight_rule(chosen_TK), ids_TK.masked_fill(absent_TK, self.num_experts)


def _build_selection(spec: Spec, num_experts: int, top_k: int) -> Any:
    name, options = split_spec(spec, "selection")
    if name not in SELECTIONS:
        raise ConfigError(f"unknown selection {name!r}: {suggest(name, SELECTIONS)}")
    kind = SELECTIONS[name]
    check_options(f"selection {name!r}", options, keyword_names(kind))
    try:
        selection = kind(**options)
    except TypeError as error:
        raise ConfigError(f"selection {name!r}: {error}") from None
    selection.check(num_experts, top_k, ConfigError)
    return selection


class LinearRouter(LinearScore, TokenChoiceRouter):
    """Token choice by a linear score."""

    def choice(self, x_TD: Tensor, context: RoutingContext) -> ops.TokenChoice | None:
        """What `forward` would do with these tokens, as data; None where one operator has not all of it."""
        weight, bias, jitters = self.weight, self.selection_bias, self.gate_noise or self.input_jitter
        if type(self) is not LinearRouter or "score" in vars(self) or not self._is_plain(context):
            return None  # a class of one's own may do anything
        if not self.fp32 or weight.dtype != x_TD.dtype or weight.device != x_TD.device:
            return None
        if self.training and (jitters or self.noise_weight is not None):
            return None
        top_k, capacity_factor = self._settings(context)
        capacity = capacity_of(capacity_factor, top_k, self.num_experts, context, len(x_TD))
        return ops.TokenChoice(
            weight, top_k, self.scoring, bias, self.weight_rule.normalizes(top_k), self.weight_rule.scale,
            None if capacity is None else capacity.bound, self.batch_prioritized,
        )  # fmt: skip


class CosineRouter(CosineScore, TokenChoiceRouter):
    """Token choice by cosine similarity with a learned temperature."""


class HashRouter(HashScore, TokenChoiceRouter):
    """Token choice by a hash of the token id."""


def _from_config(
    kind: type[Router], score: type[Router], config: MoEConfig, options: dict[str, Any]
) -> Router:
    """A router from a layer's config and the options of its spec."""
    names = {*keyword_names(score), *keyword_names(TokenChoiceRouter)} - {"model_dim", "num_experts"}
    check_options(f"router {config.router!r}", options, names)
    rules: dict[str, Any] = {
        "top_k": config.top_k,
        "renormalize": config.renormalize,
        "capacity_factor": config.capacity_factor,
        "batch_prioritized": config.batch_prioritized,
        **options,
    }
    return kind(model_dim=config.model_dim, num_experts=config.num_experts, **rules)


@ROUTERS.register("linear")
def linear(config: MoEConfig, **options: Any) -> Router:
    """Linear score; see `LinearScore` and `TokenChoiceRouter` for the options."""
    return _from_config(LinearRouter, LinearScore, config, options)


@ROUTERS.register("cosine")
def cosine(config: MoEConfig, **options: Any) -> Router:
    """Cosine score with a learned temperature; see `CosineScore` and `TokenChoiceRouter` for the options."""
    return _from_config(CosineRouter, CosineScore, config, options)


@ROUTERS.register("hash")
def hash_of_tokens(config: MoEConfig, **options: Any) -> Router:
    """Experts fixed by the token id, each with weight 1 / K; see `HashScore` for the options."""
    fixed = {"scoring": "uniform", "renormalize": "always"}
    return _from_config(HashRouter, HashScore, config, {**fixed, **options})
