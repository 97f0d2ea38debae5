"""Row operators in plain PyTorch: assign, gather, grouped linear, weighted scatter. Any device, any dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are accumulated in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def segments(counts_E: Tensor, slot_E: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """(slot, start, stop) of every expert that is here and has rows. Reads the counts on the host."""
    counts = counts_E.tolist()
    slots = range(len(counts)) if slot_E is None else slot_E.tolist()
    stop = 0
    for slot, count in zip(slots, counts, strict=True):
        start, stop = stop, stop + count
        if count and slot >= 0:
            yield slot, start, stop


def row_product(a_NK: Tensor, b_KM: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b where no row of `a` may touch another row's result, whatever it holds.

    The half-precision products of oneDNN (AMX) multiply what lies past the end of a row by zero, which lets
    a NaN of one row into others, unless K fills whole tiles of 32.
    """
    if a_NK.dtype.itemsize == 2 and a_NK.shape[1] % 32:
        pad = -a_NK.shape[1] % 32
        a_NK, b_KM = F.pad(a_NK, (0, pad)), F.pad(b_KM, (0, 0, 0, pad))
    return torch.mm(a_NK, b_KM, out=out)


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
    total = int(counts_E.sum())
    rows_ND = x_TD.new_empty(len(unit_N), x_TD.shape[1])
    torch.index_select(x_TD, 0, unit_N[:total], out=rows_ND[:total])
    rows_ND[total:] = 0
    return rows_ND


def gather_rows_backward(grad_ND: Tensor, unit_N: Tensor, counts_E: Tensor, num_units: int) -> Tensor:
    return scatter_combine(grad_ND, unit_N, None, counts_E, num_units, grad_ND.dtype)


def grouped_linear(
    rows_ND: Tensor, w_SFD: Tensor, b_SF: Tensor | None, counts_E: Tensor, slot_E: Tensor | None
) -> Tensor:
    y_NF = rows_ND.new_zeros(len(rows_ND), w_SFD.shape[1])
    for slot, start, stop in segments(counts_E, slot_E):
        y = row_product(rows_ND[start:stop], w_SFD[slot].t(), out=y_NF[start:stop])
        if b_SF is not None:
            y += b_SF[slot]
    return y_NF


def grouped_linear_backward(
    grad_NF: Tensor,
    rows_ND: Tensor,
    w_SFD: Tensor,
    counts_E: Tensor,
    slot_E: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (rows, w, b); an empty tensor for those not asked for."""
    empty = rows_ND.new_empty(0)
    d_rows = torch.zeros_like(rows_ND) if needs[0] else empty
    d_w = torch.zeros_like(w_SFD) if needs[1] else empty
    d_b = w_SFD.new_zeros(w_SFD.shape[:2]) if needs[2] else empty
    for slot, start, stop in segments(counts_E, slot_E):
        grad = grad_NF[start:stop]
        if needs[0]:
            row_product(grad, w_SFD[slot], out=d_rows[start:stop])
        if needs[1]:
            d_w[slot].addmm_(grad.t(), rows_ND[start:stop])
        if needs[2]:
            d_b[slot] += grad.sum(0, dtype=wide(grad.dtype)).to(grad.dtype)
    return d_rows, d_w, d_b


def scatter_combine(
    rows_NO: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    num_units: int,
    dtype: torch.dtype,
) -> Tensor:
    total = int(counts_E.sum())
    rows = rows_NO[:total].to(wide(rows_NO.dtype))
    if weight_N is not None:
        rows = rows * weight_N[:total, None]
    out = rows.new_zeros(num_units, rows.shape[1])
    return out.index_add_(0, unit_N[:total], rows).to(dtype)


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


KERNELS = {
    "assign": assign,
    "gather_rows": gather_rows,
    "gather_rows_backward": gather_rows_backward,
    "grouped_linear": grouped_linear,
    "grouped_linear_backward": grouped_linear_backward,
    "scatter_combine": scatter_combine,
    "scatter_combine_backward": scatter_combine_backward,
}
