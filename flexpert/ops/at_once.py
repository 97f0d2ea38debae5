"""Several operators in one call into a backend, for few tokens: decoding waits for every microsecond.

Such a shortcut is no operator of its own. It is taken where each of the operators it stands for would run on
the same backend, no gradient is wanted and nobody watches; else these run one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert import ops

from . import select
from .handles import ExpertMLP, TokenChoice
from .wanted import wanted_kernel
from .watched import is_unwatched

FEW_TOKENS = 64


def routed_mlp(x_TD: Tensor, choice: TokenChoice, mlp: ExpertMLP) -> Tensor:
    """y_TO of a whole layer: `router_logits`, `route` and `grouped_mlp`."""
    if (y_TO := _shortcut("routed_mlp", x_TD, choice, mlp)) is not None:
        return y_TO
    routes = ops.route(
        ops.router_logits(x_TD, choice.weight_ED), choice.top_k, choice.scoring, bias_E=choice.bias_E,
        normalize=choice.normalize, scale=choice.scale, limit=choice.limit, prioritized=choice.prioritized,
    )  # fmt: skip
    return _experts(x_TD, routes.unit_N, routes.weight_N, routes.counts_E, mlp)


def chosen_mlp(x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, mlp: ExpertMLP) -> Tensor:
    """y_TO of experts that are given: `assign` and `grouped_mlp`.

    Args:
        x_TD: tokens.
        ids_TK: int64, each token's experts; outside [0, E) for none.
        weight_TK: fp32 (fp64 for fp64 tokens), their weights.
        mlp: E experts; its tensors have x's dtype.
    """
    if (y_TO := _shortcut("chosen_mlp", x_TD, (ids_TK, weight_TK), mlp)) is not None:
        return y_TO
    tokens = max(len(ids_TK), 1)
    order_N, counts_E = ops.assign(ids_TK.T.reshape(-1), len(mlp.w2))
    weight_N = weight_TK.T.reshape(-1).index_select(0, order_N)
    return _experts(x_TD, order_N % tokens, weight_N, counts_E, mlp)


def _experts(x_TD: Tensor, unit_N: Tensor, weight_N: Tensor, counts_E: Tensor, mlp: ExpertMLP) -> Tensor:
    rows, weights = (x_TD, unit_N, weight_N, counts_E, None), (mlp.w1, mlp.b1, mlp.w2, mlp.b2)
    if mlp.packed is not None:
        return ops.grouped_mlp_packed(*rows, *weights, *mlp.packed, mlp.activation)
    return ops.grouped_mlp(*rows, *weights, mlp.activation, mlp.recompute)


def _shortcut(
    name: str, x_TD: Tensor, chosen: TokenChoice | tuple[Tensor, Tensor], mlp: ExpertMLP
) -> Tensor | None:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not 0 < len(x_TD) <= FEW_TOKENS:
        return None
    if select.override() is not None or wanted_kernel() != "auto":
        return None
    if not is_unwatched((x_TD, *chosen, *mlp[:4])):
        return None
    y_TO: Tensor | None = select.shortcut(name, x_TD.dtype, packed=mlp.packed is not None)(x_TD, chosen, mlp)
    return y_TO
