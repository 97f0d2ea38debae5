"""The naive truth: every operator as loops over rows and experts, with plain PyTorch autograd.

Shapes as in `flexpert.ops`. Half dtypes accumulate in fp32; run it in float64 to judge the fast versions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import get_activation
from .packing import unpack_mlp
from .portable_route import SCORINGS, TINY, ranked_by


def assign(key_N: Tensor, num_bins: int, capacity_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `flexpert.ops.assign`."""
    kept: list[list[int]] = [[] for _ in range(num_bins)]
    rest: list[int] = []
    for i, key in enumerate(key_N.tolist()):
        room = 0 <= key < num_bins and (capacity_B is None or len(kept[key]) < int(capacity_B[key]))
        (kept[key] if room else rest).append(i)
    order = [i for group in (*kept, rest) for i in group]
    counts = [len(group) for group in kept]
    return key_N.new_tensor(order, dtype=torch.int64), key_N.new_tensor(counts, dtype=torch.int64)


def route(
    logits_TE: Tensor,
    top_k: int,
    scoring: str,
    bias_E: Tensor | None,
    normalize: bool,
    scale: float,
    limit: int,
    prioritized: bool,
) -> tuple[Tensor, ...]:
    """See `flexpert.ops.route`; the fields of `Routes`, `limit` -1 for none."""
    (tokens, num_experts), score_TE = logits_TE.shape, SCORINGS[scoring](logits_TE)
    ranking_TE = ranked_by(scoring, logits_TE, score_TE)
    ranking = (ranking_TE if bias_E is None else ranking_TE + bias_E).tolist()
    ids = [_best_first(row)[:top_k] for row in ranking]
    best = score_TE.detach().amax(-1).tolist()
    first = _best_first(best) if prioritized else list(range(tokens))
    kept: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    rest: list[tuple[int, int]] = []
    for k, t in [(k, t) for k in range(top_k) for t in first]:
        mine = kept[ids[t][k]]
        (mine if limit < 0 or len(mine) < limit else rest).append((k, t))
    weights = []
    for rows in kept:
        for k, t in rows:
            total = sum((score_TE[t, e] for e in ids[t]), start=score_TE.new_zeros(()))
            weights.append(score_TE[t, ids[t][k]] / (total.clamp(min=TINY) if normalize else 1) * scale)
    rows = [row for group in (*kept, rest) for row in group]
    start = sum(len(group) for group in kept[:-1])
    slots = [i for group in kept for i in range(len(group))]
    slots += range(len(slots) - start, len(rows) - start)
    integers = (
        [k * tokens + t for k, t in rows],
        [t for _, t in rows],
        [len(group) for group in kept],
        slots if limit >= 0 else [],
    )
    order_N, unit_N, counts_E, slot_N = (torch.tensor(v, dtype=torch.int64) for v in integers)
    zero = score_TE[:0].sum()
    weight_N = torch.stack([*weights, *[zero] * len(rest), zero])[:-1]
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(tokens, top_k)
    return score_TE, ids_TK, order_N, unit_N, weight_N, counts_E, slot_N


def _best_first(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def router_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """See `flexpert.ops.router_logits`."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return x_TD.to(wide) @ w_ED.to(wide).T


def gather_rows(x_TD: Tensor, unit_N: Tensor, counts_E: Tensor) -> Tensor:
    """See `flexpert.ops.gather_rows`."""
    total = int(counts_E.sum())
    rows = [x_TD[unit : unit + 1] for unit in unit_N[:total].tolist()]
    return torch.cat([x_TD[:0], *rows, x_TD.new_zeros(len(unit_N) - total, x_TD.shape[1])])


def grouped_linear(
    rows_ND: Tensor, w_SFD: Tensor, b_SF: Tensor | None, counts_E: Tensor, slot_E: Tensor | None = None
) -> Tensor:
    """See `flexpert.ops.grouped_linear`."""
    out, start = [rows_ND[:0] @ w_SFD[:1].sum(0).T], 0
    for expert, count in enumerate(counts_E.tolist()):
        slot = expert if slot_E is None else int(slot_E[expert])
        if slot < 0:
            out.append(rows_ND.new_zeros(count, w_SFD.shape[1]))
        else:
            y = rows_ND[start : start + count] @ w_SFD[slot].T
            out.append(y if b_SF is None else y + b_SF[slot])
        start += count
    return torch.cat([*out, rows_ND.new_zeros(len(rows_ND) - start, w_SFD.shape[1])])


def scatter_combine(
    rows_NO: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    num_units: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `flexpert.ops.scatter_combine`."""
    wide_NO = rows_NO.to(torch.promote_types(rows_NO.dtype, torch.float32))
    out = [wide_NO.new_zeros(1, rows_NO.shape[1])] * num_units
    for i, unit in enumerate(unit_N[: int(counts_E.sum())].tolist()):
        out[unit] = out[unit] + wide_NO[i : i + 1] * (1 if weight_N is None else weight_N[i])
    return torch.cat([wide_NO[:0], *out]).to(dtype)


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
) -> Tensor:
    """See `flexpert.ops.grouped_mlp`."""
    act = get_activation(activation).forward
    rows_ND = gather_rows(x_TD, unit_N, counts_E)
    if w1.dim() == 4:
        gate, up = (
            grouped_linear(rows_ND, w1[:, i], None if b1 is None else b1[:, i], counts_E, slot_E)
            for i in (0, 1)
        )
        hidden = act(gate) * up
    else:
        hidden = act(grouped_linear(rows_ND, w1, b1, counts_E, slot_E))
    rows_NO = grouped_linear(hidden, w2, b2, counts_E, slot_E)
    return scatter_combine(rows_NO, unit_N, weight_N, counts_E, len(x_TD), x_TD.dtype)


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
    """See `flexpert.ops.grouped_mlp_packed`."""
    w1, w2 = unpack_mlp(w1, w2, x_TD.shape[1], hidden_dim, output_dim)
    return grouped_mlp(x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2, activation)
