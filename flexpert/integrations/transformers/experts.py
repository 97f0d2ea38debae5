"""The experts implementation `flexpert`: routed rows through our operators, on the model's own weights.

Letters: T tokens, K experts per token, N = T * K rows, E experts of this rank, D and F widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexpert import ops
from flexpert.ops.memory import prefer_huge_pages

from .layout import first_name, fused_activation


def experts_forward(self: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What an experts module returns: for each token the weighted sum over its experts.

    Args:
        self: the experts module; its weights are read where they lie, never copied (but under autocast, which
            computes in another dtype).
        hidden_TD: tokens.
        ids_TK: the experts of each token; ids outside [0, E) are experts of other ranks and are skipped.
        weights_TK: routing weights; they stay in fp32 where the tokens are narrower.
    """
    experts: Any = self
    first = first_name(experts)
    w1, w2 = getattr(experts, first), experts.down_proj
    b1 = getattr(experts, f"{first}_bias") if experts.has_bias else None
    b2 = experts.down_proj_bias if experts.has_bias else None
    rows = regroup(ids_TK, weights_TK, w1.shape[0], hidden_TD)
    dtype = compute_dtype(hidden_TD, w1)
    x_TD, w1, w2 = (t if t.dtype is dtype else t.to(dtype) for t in (hidden_TD, w1, w2))
    b1, b2 = (b if b is None or b.dtype is dtype else b.to(dtype) for b in (b1, b2))
    activation = fused_activation(experts)
    if activation is None:
        y_TD = _unfused(experts, x_TD, rows, (w1, b1, w2, b2))
    else:
        if not torch.compiler.is_compiling():
            prefer_huge_pages(w1)
            prefer_huge_pages(w2)
        if experts.has_gate:
            w1 = w1.unflatten(1, (2, -1))
            b1 = None if b1 is None else b1.unflatten(1, (2, -1))
        y_TD = ops.grouped_mlp(x_TD, *rows, None, w1, b1, w2, b2, activation)
    return y_TD if y_TD.dtype is hidden_TD.dtype else y_TD.to(hidden_TD.dtype)


def regroup(
    ids_TK: Tensor, weights_TK: Tensor, num_experts: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(unit_N, weight_N, counts_E): the choices of tokens as rows grouped by expert, absent experts last."""
    order_N, counts_E = ops.assign(ids_TK.reshape(-1).long(), num_experts)
    weight_N = weights_TK.reshape(-1).index_select(0, order_N)
    wide = torch.float64 if like.dtype is torch.float64 else torch.float32
    return order_N // ids_TK.shape[1], weight_N.to(wide), counts_E


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of the weights."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _unfused(
    experts: Any,
    x_TD: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
) -> Tensor:
    """The same with the model's own gate, activation and norm between our operators."""
    unit_N, weight_N, counts_E = rows
    w1, b1, w2, b2 = weights
    if experts.is_transposed:
        w1, w2 = w1.mT, w2.mT
    rows_ND = ops.gather_rows(x_TD, unit_N, counts_E)
    pre = ops.grouped_linear(rows_ND, w1, b1, counts_E)
    hidden = experts._apply_gate(pre) if experts.has_gate else experts.act_fn(pre)
    y_ND = ops.grouped_linear(hidden.to(x_TD.dtype), w2, b2, counts_E)
    if experts.has_post_expert_norm:
        y_ND = experts.post_expert_norm(y_ND)
    return ops.scatter_combine(y_ND, unit_N, weight_N, counts_E, x_TD.shape[0], x_TD.dtype)
