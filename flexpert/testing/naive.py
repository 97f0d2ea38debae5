"""A layer computed token by token in plain loops.

The loops share no code with routers, dispatch, operators or experts: they are the definition written out, for
tokens that choose by a linear, cosine or hash score, without noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexpert.combine import OnePlus, Scaled, WeightedInput
from flexpert.core.context import RoutingContext
from flexpert.core.errors import InputError
from flexpert.core.unset import UNSET, UnsetType, pick
from flexpert.experts import (
    ConstantExperts,
    CopyExperts,
    ExpertBank,
    GLUExperts,
    MixedExperts,
    MLPExperts,
    SharedExpert,
    ZeroExperts,
)
from flexpert.layer import MoE
from flexpert.ops.activations import get_activation
from flexpert.routers import CosineRouter, HashRouter, LinearRouter, TokenChoiceRouter
from flexpert.routers.selections import TopK


@dataclass(frozen=True, kw_only=True)
class NaiveResult:
    """What the loops computed.

    Attributes:
        output: (..., output_dim), differentiable.
        chosen: for each token its experts in order of preference, before drops.
        kept: for each expert the (group, choice, token) it computes, in order of priority within a group.
        weight_N: the weights of `kept`, expert after expert.
    """

    output: Tensor
    chosen: list[list[int]]
    kept: list[list[tuple[int, int, int]]]
    weight_N: Tensor


def naive_moe(
    layer: MoE,
    x: Tensor,
    *,
    context: RoutingContext | None = None,
    top_k: int | UnsetType = UNSET,
    capacity_factor: float | None | UnsetType = UNSET,
) -> NaiveResult:
    """A call of the layer as loops over tokens and experts, in the dtype of x (fp64 to judge by).

    Raises:
        InputError: a router or experts that the loops do not know.
    """
    router = _known(layer.router)
    context = (context or RoutingContext()).with_overrides(top_k, capacity_factor).for_tokens(x.shape[:-1])
    x_TD = x.reshape(-1, x.shape[-1])
    tokens = range(len(x_TD))
    real = [context.mask is None or bool(context.mask[t]) for t in tokens]
    logits = [
        _logits(router, x_TD[t], context, t).masked_fill(_ruled_out(context, t), -math.inf)
        if real[t]
        else None
        for t in tokens
    ]
    scores = [None if z is None else _scores(router.scoring, z) for z in logits]
    chosen = [_choose(router, z, s, context) for z, s in zip(logits, scores, strict=True)]
    weights = [_weights(router, s, ids, context) for s, ids in zip(scores, chosen, strict=True)]
    kept = _keep(router, chosen, scores, real, context)
    y = [x.new_zeros(layer.experts.output_dim) for _ in tokens]
    for expert, rows in enumerate(kept):
        for _, choice, t in rows:
            y[t] = y[t] + _contribution(layer, expert, weights[t][choice], x_TD[t])
    if layer.shared is not None:
        y = [y[t] + _shared(layer.shared, x_TD[t]) for t in tokens]
    output = torch.stack(y) if y else x.new_zeros(0, layer.experts.output_dim)
    row_weights = [weights[t][choice] for rows in kept for _, choice, t in rows]
    return NaiveResult(
        output=output.view(*x.shape[:-1], output.shape[-1]),
        chosen=chosen,
        kept=kept,
        weight_N=torch.stack(row_weights) if row_weights else x.new_zeros(0),
    )


def _known(router: nn.Module) -> TokenChoiceRouter:
    kinds = (LinearRouter, CosineRouter, HashRouter)
    if not isinstance(router, kinds) or not isinstance(router.selection, TopK):
        raise InputError(f"{type(router).__name__}: the loops know top-k by a linear, cosine or hash score")
    if router.training and (router.gate_noise or router.input_jitter or router.noise_weight is not None):
        raise InputError("the loops draw no noise: call layer.eval() before")
    return router


def _logits(router: nn.Module, x_D: Tensor, context: RoutingContext, t: int) -> Tensor:
    if isinstance(router, LinearRouter):
        return torch.stack([(w_D * x_D).sum() for w_D in router.weight])
    if isinstance(router, CosineRouter):
        h = router.projector.weight @ x_D + router.projector.bias
        cosines = [(h * m).sum() / (h.square().sum() * m.square().sum()).sqrt() for m in router.weight]
        return torch.stack(cosines) * torch.exp(router.log_scale.clamp(max=router.max_log_scale))
    ids = context.token_ids
    assert isinstance(router, HashRouter)
    assert ids is not None
    counters = [int(ids[t]) * router.num_experts + e for e in range(router.num_experts)]
    return x_D.new_tensor([_uniform(router.hash_seed, counter) for counter in counters])


def _ruled_out(context: RoutingContext, t: int) -> Tensor:
    mask = context.expert_mask
    if mask is None:
        return torch.tensor(False)
    return ~(mask if mask.dim() == 1 else mask[t])


def _uniform(key: int, counter: int) -> float:
    """The counter-based generator in whole numbers (SplitMix64)."""
    return ((_mix(_mix(counter) + key) >> 41) + 0.5) / 2**23


def _mix(z: int) -> int:
    z = z * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def _scores(scoring: str, logits_E: Tensor) -> Tensor:
    if scoring == "softmax":
        powers = (logits_E - logits_E.max()).exp()
        return powers / powers.sum()
    if scoring == "sigmoid":
        return 1 / (1 + (-logits_E).exp())
    if scoring == "sqrt_softplus":
        return (1 + logits_E.exp()).log().sqrt()
    return torch.ones_like(logits_E)


def _choose(
    router: TokenChoiceRouter, logits: Tensor | None, scores: Tensor | None, context: RoutingContext
) -> list[int]:
    if logits is None or scores is None:
        return []
    ranking = (logits if router.scoring == "uniform" else scores).tolist()
    if router.selection_bias is not None:
        ranking = [value + float(bias) for value, bias in zip(ranking, router.selection_bias, strict=True)]
    order = sorted(range(len(ranking)), key=lambda e: -ranking[e])
    return [order[i] for i in _positions(router, context) if logits[order[i]] > -math.inf]


def _positions(router: TokenChoiceRouter, context: RoutingContext) -> Sequence[int]:
    return range(pick(context.top_k, router.top_k)) if context.ranks is None else context.ranks


def _weights(
    router: TokenChoiceRouter, scores: Tensor | None, ids: list[int], context: RoutingContext
) -> list[Tensor]:
    if scores is None or not ids:
        return []
    rule = router.weight_rule
    weights = [scores[e] for e in ids]
    if rule.straight_through:
        weights = [w / w.detach() for w in weights]
    elif rule.renormalize == "always" or (rule.renormalize and len(_positions(router, context)) > 1):
        total = torch.stack(weights).sum()
        weights = [w / total for w in weights]
    return [w * rule.scale for w in weights]


def _keep(
    router: TokenChoiceRouter,
    chosen: list[list[int]],
    scores: list[Tensor | None],
    real: list[bool],
    context: RoutingContext,
) -> list[list[tuple[int, int, int]]]:
    """First choices of a group before its second ones, in order of arrival or of the best score."""
    kept: list[list[tuple[int, int, int]]] = [[] for _ in range(router.num_experts)]
    factor = pick(context.capacity_factor, router.capacity_factor)
    size = len(chosen) // context.num_groups
    top_k = len(_positions(router, context))
    best = [0.0 if score is None else float(score.detach().max()) for score in scores]
    for group in range(context.num_groups):
        members = [t for t in range(group * size, (group + 1) * size) if real[t]]
        limit = math.inf
        if factor:
            limit = top_k * max(1, int(abs(factor) * math.ceil(len(members) / router.num_experts)))
        if router.batch_prioritized:
            members.sort(key=lambda t: -best[t])
        taken = [0] * router.num_experts
        for choice in range(router.num_experts):
            for t in (t for t in members if choice < len(chosen[t])):
                expert = chosen[t][choice]
                if taken[expert] < limit:
                    taken[expert] += 1
                    kept[expert].append((group, choice, t))
    return kept


def _contribution(layer: MoE, expert: int, weight: Tensor, x_D: Tensor) -> Tensor:
    combine = layer.combine
    if isinstance(combine, WeightedInput):
        return _expert(layer.experts, expert, weight * x_D)
    result = _expert(layer.experts, expert, x_D)
    if isinstance(combine, OnePlus):
        return (1 + weight) * result
    if isinstance(combine, Scaled):
        return combine.scale * (result if combine.hard else weight * result)
    return weight * result


def _expert(bank: ExpertBank, slot: int, x_D: Tensor) -> Tensor:
    if isinstance(bank, MixedExperts):
        groups = [group for group in bank.children() if isinstance(group, ExpertBank)]
        places = [(group, place) for group in groups for place in range(group.num_experts)]
        return _expert(*places[slot], x_D)
    if isinstance(bank, MLPExperts):
        return _feed_forward(bank, slot, x_D)
    if isinstance(bank, ZeroExperts):
        return torch.zeros_like(x_D)
    if isinstance(bank, CopyExperts):
        return x_D
    if isinstance(bank, ConstantExperts):
        a, b = _scores("softmax", bank.weight[slot] @ x_D)
        return a * x_D + b * bank.value[slot]
    raise InputError(f"{type(bank).__name__}: the loops know MLP, GLU, zero, copy and constant experts")


def _feed_forward(bank: MLPExperts, slot: int, x_D: Tensor) -> Tensor:
    act = get_activation(bank.activation).forward
    w1, _, w2, _ = bank.weights_in(x_D.dtype)
    pre = w1[slot] @ x_D
    if bank.b1 is not None:
        pre = pre + bank.b1[slot]
    hidden = act(pre[0]) * pre[1] if isinstance(bank, GLUExperts) else act(pre)
    y = w2[slot] @ hidden
    return y if bank.b2 is None else y + bank.b2[slot]


def _shared(shared: nn.Module, x_D: Tensor) -> Tensor:
    if not isinstance(shared, SharedExpert):
        raise InputError(f"{type(shared).__name__}: the loops know SharedExpert")
    y = _feed_forward(shared.expert, 0, x_D)
    return y if shared.gate is None else y * _scores("sigmoid", shared.gate.weight @ x_D)
