"""Routing operators in plain PyTorch: scores, top-k choice, weights and order in one; the linear score."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Kernel
from .bags import wide
from .portable import assign

TINY = 1e-20  # the least sum that weights are divided by

SCORINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    # The root's slope is infinite at 0, where softplus underflows.
    "sqrt_softplus": lambda z: F.softplus(z).clamp(min=torch.finfo(z.dtype).tiny).sqrt(),
    "uniform": torch.ones_like,
}

# (score, gradient of score) -> gradient of logits.
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": lambda p, grad: p * (grad - (p * grad).sum(-1, keepdim=True)),
    "sigmoid": lambda p, grad: grad * (1 - p) * p,
    "sqrt_softplus": lambda p, grad: grad * torch.expm1(-p.square()) / (-2 * p),
}


def ranked_by(scoring: str, logits_TE: Tensor, score_TE: Tensor) -> Tensor:
    """What puts experts in order, but for a bias: their scores, or, where all are 1, their logits."""
    return logits_TE if scoring == "uniform" else score_TE


def normalized(score_TK: Tensor) -> Tensor:
    """The scores of each token's choices divided by their sum."""
    return score_TK / score_TK.sum(-1, keepdim=True).clamp(min=TINY)


def places(row_N: Tensor, counts_E: Tensor) -> Tensor:
    """The place of each row among its expert's; rows past the total count on from the last expert's."""
    ends_E = counts_E.cumsum(0)
    expert_N = torch.searchsorted(ends_E, row_N, right=True).clamp(max=counts_E.shape[0] - 1)
    return row_N - (ends_E - counts_E)[expert_N]


def route(
    logits_TE: Tensor,
    top_k: int,
    scoring: str,
    bias_E: Tensor | None,
    normalize: bool,
    scale: float,
    limit: int,
    prioritized: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(score_TE, ids_TK, order_N, unit_N, weight_N, counts_E, slot_N)."""
    tokens, num_experts = logits_TE.shape
    score_TE = SCORINGS[scoring](logits_TE)
    ranking_TE = ranked_by(scoring, logits_TE, score_TE)
    ids_TK = (ranking_TE if bias_E is None else ranking_TE + bias_E).topk(top_k, dim=-1).indices
    weight_TK = score_TE.gather(1, ids_TK)
    weight_TK = normalized(weight_TK) if normalize else weight_TK
    weight_TK = weight_TK if scale == 1.0 else weight_TK * scale
    limit_E = None if limit < 0 else ids_TK.new_full((num_experts,), limit)
    if prioritized:
        first_T = score_TE.amax(-1).argsort(descending=True, stable=True)
        order_N, counts_E = assign(ids_TK[first_T].T.reshape(-1), num_experts, limit_E)
        unit_N = first_T[order_N % max(tokens, 1)]
        order_N = order_N // max(tokens, 1) * tokens + unit_N
    else:
        order_N, counts_E = assign(ids_TK.T.reshape(-1), num_experts, limit_E)
        unit_N = order_N % max(tokens, 1)
    weight_N = weight_TK.T.reshape(-1)[order_N]
    if limit < 0:
        return score_TE, ids_TK, order_N, unit_N, weight_N, counts_E, ids_TK.new_empty(0)
    row_N = torch.arange(order_N.shape[0], device=order_N.device)
    weight_N = weight_N.where(row_N < counts_E.sum(), 0.0)
    return score_TE, ids_TK, order_N, unit_N, weight_N, counts_E, places(row_N, counts_E)


def route_backward(
    score_TE: Tensor,
    ids_TK: Tensor,
    order_N: Tensor,
    counts_E: Tensor,
    d_score_TE: Tensor | None,
    d_weight_N: Tensor | None,
    scoring: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits."""
    d_TE = torch.zeros_like(score_TE) if d_score_TE is None else d_score_TE
    if d_weight_N is not None:
        row_N = torch.arange(order_N.shape[0], device=order_N.device)
        kept_N = (d_weight_N * scale).where(row_N < counts_E.sum(), 0.0)
        d_TK = torch.empty_like(kept_N).scatter_(0, order_N, kept_N).view(ids_TK.shape[::-1]).T
        if normalize:
            chosen_TK = score_TE.gather(1, ids_TK)
            total_T1 = chosen_TK.sum(-1, keepdim=True)
            share_TK = (chosen_TK / total_T1).where(total_T1 >= TINY, 0.0)
            d_TK = (d_TK - (d_TK * share_TK).sum(-1, keepdim=True)) / total_T1.clamp(min=TINY)
        d_TE = d_TE.scatter_add(1, ids_TK, d_TK)
    return _SLOPES[scoring](score_TE, d_TE)


def router_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """x W^T of widened operands."""
    dtype = wide(x_TD.dtype)
    return F.linear(x_TD.to(dtype), w_ED.to(dtype))


def router_logits_backward(
    grad_TE: Tensor, x_TD: Tensor, w_ED: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, w); an empty tensor for those not asked for."""
    d_x, d_w = x_TD.new_empty(0), w_ED.new_empty(0)
    if needs[0]:
        d_x = (grad_TE @ w_ED.to(grad_TE.dtype)).to(x_TD.dtype)
    if needs[1]:
        d_w = (grad_TE.T @ x_TD.to(grad_TE.dtype)).to(w_ED.dtype)
    return d_x, d_w


KERNELS: dict[str, Kernel] = {
    "route": route,
    "route_backward": route_backward,
    "router_logits": router_logits,
    "router_logits_backward": router_logits_backward,
}
