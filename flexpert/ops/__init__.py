"""Operators: the only place with hand-written kernels.

Shapes: T tokens, D model_dim, F hidden_dim, O output_dim, E experts, S weight slots, N rows (assignments),
U units (usually T). Rows are grouped by expert: the first counts_E[0] rows are expert 0's, and so on; rows
past counts_E.sum() are padding and are never read. Ids and counts are trusted: no value is checked, nothing
waits for the device. Sums are accumulated in fp32 (fp64 for fp64). All are differentiable once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.errors import ConfigError

from .activations import ACTIVATIONS, Activation, get_activation
from .at_once import FEW_TOKENS, chosen_mlp, routed_mlp
from .calls import call as _call
from .handles import ExpertMLP, TokenChoice
from .portable_route import SCORINGS
from .routes import Routes
from .select import able, override, report, use_backend
from .wanted import wanted_kernel, wanting

__all__ = [
    "ACTIVATIONS",
    "FEW_TOKENS",
    "SCORINGS",
    "Activation",
    "ExpertMLP",
    "Routes",
    "TokenChoice",
    "able",
    "assign",
    "chosen_mlp",
    "gather_rows",
    "get_activation",
    "grouped_linear",
    "grouped_mlp",
    "grouped_mlp_packed",
    "report",
    "route",
    "routed_mlp",
    "router_logits",
    "scatter_combine",
    "use_backend",
    "wanted_kernel",
    "wanting",
]


def assign(key_N: Tensor, num_bins: int, capacity_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Group candidate assignments by bin, in order of priority, keeping at most `capacity_B` in each.

    Args:
        key_N: int64, the bin of each candidate, most important first; any value outside [0, num_bins) means
            that the candidate is absent.
        num_bins: number of bins B.
        capacity_B: int64, how many a bin keeps; None keeps all.

    Returns:
        (order_N, counts_B), int64: a permutation of range(N) with the kept candidates first, by bin and by
        priority inside a bin, then the others in their order; and how many each bin keeps.
    """
    if (whole := override()) is not None:
        return whole.assign(key_N, num_bins, capacity_B)
    order_N, counts_B = _call("assign", key_N, num_bins, capacity_B)
    return order_N, counts_B


def route(
    logits_TE: Tensor,
    top_k: int,
    scoring: str = "softmax",
    *,
    bias_E: Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    limit: int | None = None,
    prioritized: bool = False,
) -> Routes:
    """Token choice in one operator: gate scores, the best experts of each token, weights, order by expert.

    Args:
        logits_TE: floating point; scores and weights have its dtype.
        top_k: K, 1 <= K <= E; each token takes the K experts of highest score + bias.
        scoring: a name in `SCORINGS`; where all scores are 1 ("uniform"), the logits take their place in the
            choice, and there is no gradient.
        bias_E: for the choice alone; no gradient.
        normalize: divide a token's weights by their sum.
        scale: factor on every weight.
        limit: rows an expert keeps; None for all. First choices go before second ones; within a choice the
            tokens in their order.
        prioritized: within a choice tokens of higher best score first, equal ones in their order.

    Raises:
        ConfigError: the scoring is unknown.
    """
    if scoring not in SCORINGS:
        raise ConfigError(f"unknown scoring {scoring!r}; choose one of: {', '.join(SCORINGS)}")
    if scoring == "uniform":
        logits_TE = logits_TE.detach()
    rules = top_k, scoring, bias_E, normalize, scale, -1 if limit is None else limit, prioritized
    if (whole := override()) is not None:
        return Routes(*whole.route(logits_TE, *rules))
    return Routes(*_call("route", logits_TE, *rules))


def router_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """logits_TE = x W^T in fp32 (fp64 for fp64): products and sums of the values as they are."""
    if (whole := override()) is not None:
        return whole.router_logits(x_TD, w_ED)
    return _call("router_logits", x_TD, w_ED)


def gather_rows(x_TD: Tensor, unit_N: Tensor, counts_E: Tensor) -> Tensor:
    """rows_ND with row i = x[unit_N[i]], and zeros past counts_E.sum()."""
    if (whole := override()) is not None:
        return whole.gather_rows(x_TD, unit_N, counts_E)
    return _call("gather_rows", x_TD, unit_N, counts_E)


def grouped_linear(
    rows_ND: Tensor, w_SFD: Tensor, b_SF: Tensor | None, counts_E: Tensor, slot_E: Tensor | None = None
) -> Tensor:
    """y_NF with row i = w[slot] @ row i + b[slot], where slot = slot_E[expert of row i].

    slot_E is int64; None stands for range(E). The rows of an expert with slot -1 cost nothing, give zeros
    and get zero gradients, as do rows past counts_E.sum().
    """
    if (whole := override()) is not None:
        return whole.grouped_linear(rows_ND, w_SFD, b_SF, counts_E, slot_E)
    return _call("grouped_linear", rows_ND, w_SFD, b_SF, counts_E, slot_E)


def scatter_combine(
    rows_NO: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    num_units: int,
    dtype: torch.dtype,
) -> Tensor:
    """y_UO with y[u] = sum of weight_N[i] * rows_NO[i] over the rows i of unit u, in `dtype`.

    weight_N is fp32 (fp64 for fp64 rows); None stands for ones. Units without rows get zeros.
    """
    if (whole := override()) is not None:
        return whole.scatter_combine(rows_NO, unit_N, weight_N, counts_E, num_units, dtype)
    return _call("scatter_combine", rows_NO, unit_N, weight_N, counts_E, num_units, dtype)


def grouped_mlp(
    x_TD: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    slot_E: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    recompute: bool = False,
) -> Tensor:
    """Gather, expert MLP and weighted scatter in one operator: y_TO in x's dtype.

    Args:
        x_TD: tokens; the weights and biases have its dtype.
        unit_N: int64, the token of each row.
        weight_N: fp32 (fp64 for fp64 tokens) factor of each row's output; None stands for ones.
        counts_E: int64, rows per expert.
        slot_E: int64, weight slot of each expert, -1 for an expert that is not here; None for range(E).
        w1: (S, F, D), or (S, 2, F, D) for a gated MLP: act(w1[:, 0] x + b1[:, 0]) * (w1[:, 1] x + b1[:, 1]).
        b1: (S, F), or (S, 2, F) for a gated MLP; or None.
        w2: (S, O, F).
        b2: (S, O), added before weighting; or None.
        activation: a name in `ACTIVATIONS`.
        recompute: keep the arguments alone for backward, which then computes the hidden layer's
            pre-activation, (N, F) or (N, 2 F), again. The results have the same bits.

    Raises:
        ConfigError: the activation is unknown.
    """
    if (whole := override()) is not None:
        return whole.grouped_mlp(x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2, activation)
    differentiates = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x_TD, weight_N, w1, b1, w2, b2)
    )
    modes = differentiates and not recompute, differentiates and recompute
    args = x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2, activation, *modes
    y_TO, _ = _call("grouped_mlp", *args)
    return y_TO


def grouped_mlp_packed(
    x_TD: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    slot_E: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden_dim: int,
    output_dim: int,
    activation: str,
) -> Tensor:
    """`grouped_mlp` with weights from `flexpert.ops.packing.pack_mlp`: forward only, bf16.

    Args:
        hidden_dim: F, which the packed weights do not tell.
        output_dim: O, likewise.
        x_TD, and the rest: as for `grouped_mlp`; w1 and w2 are packed.

    Raises:
        ConfigError: the activation is unknown.
        FlexpertError: a gradient is asked for, in the backward pass.
    """
    args = x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2, hidden_dim, output_dim, activation
    if (whole := override()) is not None:
        return whole.grouped_mlp_packed(*args)
    return _call("grouped_mlp_packed", *args)
