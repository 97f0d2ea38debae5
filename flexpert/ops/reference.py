"""The naive truth: every operator as loops over rows and experts, with plain PyTorch autograd.

Shapes as in `flexpert.ops`. Half dtypes accumulate in fp32; run it in float64 to judge the fast versions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import get_activation


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
