"""Row operators in plain PyTorch: assign, gather, grouped linear, weighted scatter. Any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import Kernel
from .bags import sum_rows, wide
from .memory import empty
from .products import is_transposed, outer_product, pad_rows, row_product, segments, slack


def assign(key_N: Tensor, num_bins: int, capacity_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """One stable sort; drops are found by the rank inside a bin, and need no second sort."""
    bin_N = torch.where((key_N < 0) | (key_N >= num_bins), num_bins, key_N)
    sorted_N, order_N = torch.sort(bin_N, stable=True)
    edges = torch.searchsorted(sorted_N, torch.arange(num_bins + 1, device=key_N.device))
    counts_B = edges.diff()
    if capacity_B is None:
        return order_N, counts_B
    index_N = torch.arange(len(key_N), device=key_N.device)
    limit = torch.cat([capacity_B.clamp(min=0), capacity_B.new_zeros(1)])
    rank_N = index_N - edges[sorted_N]
    dropped_N = rank_N >= limit[sorted_N]
    counts_B = torch.minimum(counts_B, limit[:-1])
    ends = torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)])
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.where(dropped_N, -1, ends[sorted_N] + rank_N)
    is_dropped = place_N < 0
    place_N = torch.where(is_dropped, ends[-1] - 1 + is_dropped.cumsum(0), place_N)
    return torch.empty_like(order_N).scatter_(0, place_N, index_N), counts_B


def gather_rows(x_TD: Tensor, unit_N: Tensor, counts_E: Tensor) -> Tensor:
    """Zeros past the total."""
    total = int(counts_E.sum())
    rows_ND = x_TD.new_empty(len(unit_N), x_TD.shape[1])
    torch.index_select(x_TD, 0, unit_N[:total], out=rows_ND[:total])
    rows_ND[total:] = 0
    return rows_ND


def gather_rows_backward(grad_ND: Tensor, unit_N: Tensor, counts_E: Tensor, num_units: int) -> Tensor:
    """The sum over the rows of each unit."""
    return scatter_combine(grad_ND, unit_N, None, counts_E, num_units, grad_ND.dtype)


def grouped_linear(
    rows_ND: Tensor, w_SFD: Tensor, b_SF: Tensor | None, counts_E: Tensor, slot_E: Tensor | None
) -> Tensor:
    """One product per expert."""
    total, dtype = len(rows_ND), rows_ND.dtype
    y_NF = empty(rows_ND, (total + slack(dtype), w_SFD.shape[1]))
    for slot, start, stop in segments(counts_E, slot_E, absent=True):
        if slot < 0:
            y_NF[start:stop] = 0
        else:
            rows = pad_rows(rows_ND[start:stop])
            row_product(
                rows, w_SFD[slot].t(), None if b_SF is None else b_SF[slot], y_NF[start : start + len(rows)]
            )
    y_NF[int(counts_E.sum()) :] = 0
    return y_NF[:total]


def grouped_linear_backward(
    grad_NF: Tensor,
    rows_ND: Tensor,
    w_SFD: Tensor,
    counts_E: Tensor,
    slot_E: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (rows, w, b); an empty tensor for those not asked for."""
    nothing, spare = rows_ND.new_empty(0), slack(rows_ND.dtype)
    d_rows = empty(rows_ND, (len(rows_ND) + spare, rows_ND.shape[1])) if needs[0] else nothing
    turned = is_transposed(w_SFD)
    d_w = empty(w_SFD, w_SFD.mT.shape if turned else w_SFD.shape) if needs[1] else nothing
    d_w = d_w.mT if turned and needs[1] else d_w
    d_b = w_SFD.new_zeros(w_SFD.shape[:2]) if needs[2] else nothing
    seen: set[int] = set()
    for slot, start, stop in segments(counts_E, slot_E, absent=True):
        if slot < 0:
            d_rows[start:stop] = 0
            continue
        grad = pad_rows(grad_NF[start:stop])
        if needs[0]:
            row_product(grad, w_SFD[slot], out=d_rows[start : start + len(grad)])
        if needs[1]:
            outer_product(grad, pad_rows(rows_ND[start:stop]), d_w[slot], accumulate=slot in seen)
        if needs[2]:
            d_b[slot] += grad.sum(0)
        seen.add(slot)
    d_rows[int(counts_E.sum()) :] = 0
    if needs[1]:
        for slot in set(range(len(w_SFD))) - seen:
            d_w[slot] = 0
    return d_rows[: len(rows_ND)], d_w, d_b


def scatter_combine(
    rows_NO: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    num_units: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weighted sum over the rows of each unit."""
    total = int(counts_E.sum())
    weight = None if weight_N is None else weight_N[:total]
    rows = rows_NO if dtype == rows_NO.dtype else rows_NO[:total].to(wide(rows_NO.dtype))
    return sum_rows(rows, unit_N[:total], weight, None, num_units).to(dtype)


def scatter_combine_backward(
    grad_UO: Tensor,
    rows_NO: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of (rows, weight); an empty tensor for those not asked for."""
    total = int(counts_E.sum())
    grad = grad_UO.index_select(0, unit_N[:total]).to(wide(rows_NO.dtype))
    d_rows, d_weight = rows_NO.new_empty(0), grad.new_empty(0)
    if needs[1] and weight_N is not None:
        d_weight = torch.zeros_like(weight_N)
        d_weight[:total] = (grad * rows_NO[:total]).sum(1)
    if needs[0]:
        d_rows = torch.zeros_like(rows_NO)
        d_rows[:total] = grad if weight_N is None else grad * weight_N[:total, None]
    return d_rows, d_weight


KERNELS: dict[str, Kernel] = {
    "assign": assign,
    "gather_rows": gather_rows,
    "gather_rows_backward": gather_rows_backward,
    "grouped_linear": grouped_linear,
    "grouped_linear_backward": grouped_linear_backward,
    "scatter_combine": scatter_combine,
    "scatter_combine_backward": scatter_combine_backward,
}
