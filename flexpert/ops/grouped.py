"""Operators through `F.grouped_mm`, for devices a host must not wait for: every shape is known beforehand.

Rows past the total, or of an expert that is in no slot, are masked where they enter and where they leave.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import get_activation, hidden_backward, hidden_forward
from .backend import Kernel
from .bags import wide
from .portable import assign
from .products import is_transposed, slack


def _expert_of_rows(counts_E: Tensor, size: int) -> Tensor:
    """(N,): the expert of each row; E past the total."""
    rows = torch.arange(size, device=counts_E.device)
    return torch.searchsorted(counts_E.cumsum(0), rows, right=True)


def _live_rows(counts_E: Tensor, slot_E: Tensor | None, size: int) -> Tensor:
    """(N, 1): whether a row belongs to an expert that is here."""
    expert_N = _expert_of_rows(counts_E, size)
    here_E = torch.ones_like(counts_E, dtype=torch.bool) if slot_E is None else slot_E >= 0
    return F.pad(here_E, (0, 1))[expert_N, None]


def _only(live_N1: Tensor, rows: Tensor) -> Tensor:
    return torch.where(live_N1, rows, 0)


def _of_slots(weight: Tensor, slot_E: Tensor | None) -> Tensor:
    """The weights in the order of experts; slot -1 gets those of slot 0, and its rows are masked."""
    return weight if slot_E is None else weight[slot_E.clamp(min=0)]


def _to_slots(gradient: Tensor, slot_E: Tensor | None, slots: int) -> Tensor:
    """Gradients by expert summed into their slots."""
    if slot_E is None:
        return gradient
    here = (slot_E >= 0).view(-1, *[1] * (gradient.dim() - 1))
    total = gradient.new_zeros((slots, *gradient.shape[1:]))
    return total.index_add_(0, slot_E.clamp(min=0), torch.where(here, gradient, 0))


def _spare(size: int, dtype: torch.dtype) -> int:
    """What is missing to a multiple of 16 bytes, which `F.grouped_mm` insists on."""
    return -size % (16 // dtype.itemsize)


def _product(rows_NK: Tensor, b_EKM: Tensor, offsets_E: Tensor) -> Tensor:
    """row @ b[expert] for every row; undefined past the total."""
    columns, dtype = b_EKM.shape[2], rows_NK.dtype
    spare_k, spare_m = _spare(rows_NK.shape[1], dtype), _spare(columns, dtype)
    if spare_k or spare_m:
        rows_NK, b_EKM = F.pad(rows_NK, (0, spare_k)), F.pad(b_EKM, (0, spare_m, 0, spare_k))
    return F.grouped_mm(rows_NK.contiguous(), b_EKM, offs=offsets_E)[:, :columns]


def _outer(a_NM: Tensor, b_NK: Tensor, offsets_E: Tensor) -> Tensor:
    """(E, M, K): a^T @ b over the rows of each expert."""
    a, b = (F.pad(t, (0, _spare(t.shape[1], t.dtype))).contiguous() for t in (a_NM, b_NK))
    return F.grouped_mm(a.t(), b, offs=offsets_E)[:, : a_NM.shape[1], : b_NK.shape[1]]


def _bias_gradient(grad_NF: Tensor, counts_E: Tensor) -> Tensor:
    """(E, F): the sum of the rows of each expert; rows past the total are zeros."""
    total = grad_NF.new_zeros((len(counts_E) + 1, grad_NF.shape[1]), dtype=wide(grad_NF.dtype))
    total.index_add_(0, _expert_of_rows(counts_E, len(grad_NF)), grad_NF.to(total.dtype))
    return total[:-1].to(grad_NF.dtype)


def gather_rows(x_TD: Tensor, unit_N: Tensor, counts_E: Tensor) -> Tensor:
    """Zeros past the total."""
    return _only(_live_rows(counts_E, None, len(unit_N)), x_TD[unit_N])


def gather_rows_backward(grad_ND: Tensor, unit_N: Tensor, counts_E: Tensor, num_units: int) -> Tensor:
    """The sum over the rows of each unit."""
    return scatter_combine(grad_ND, unit_N, None, counts_E, num_units, grad_ND.dtype)


def scatter_combine(
    rows_NO: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    num_units: int,
    dtype: torch.dtype,
) -> Tensor:
    """One index_add in fp32 or fp64."""
    rows = rows_NO.to(wide(rows_NO.dtype))
    rows = rows if weight_N is None else rows * weight_N[:, None]
    rows = _only(_live_rows(counts_E, None, len(rows)), rows)
    return rows.new_zeros(num_units, rows.shape[1]).index_add_(0, unit_N, rows).to(dtype)


def scatter_combine_backward(
    grad_UO: Tensor,
    rows_NO: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of (rows, weight); an empty tensor for those not asked for."""
    live = _live_rows(counts_E, None, len(unit_N))
    grad = grad_UO[unit_N].to(wide(rows_NO.dtype))
    d_rows, d_weight = rows_NO.new_empty(0), grad.new_empty(0)
    if needs[0]:
        d_rows = _only(live, grad if weight_N is None else grad * weight_N[:, None]).to(rows_NO.dtype)
    if needs[1]:
        d_weight = _only(live, grad * rows_NO).sum(1)
    return d_rows, d_weight


def grouped_linear(
    rows_ND: Tensor, w_SFD: Tensor, b_SF: Tensor | None, counts_E: Tensor, slot_E: Tensor | None
) -> Tensor:
    """One grouped product."""
    offsets = counts_E.cumsum(0, dtype=torch.int32)
    y = _product(rows_ND, _of_slots(w_SFD, slot_E).transpose(1, 2), offsets)
    if b_SF is not None:
        y = y + F.pad(_of_slots(b_SF, slot_E), (0, 0, 0, 1))[_expert_of_rows(counts_E, len(y))]
    return _only(_live_rows(counts_E, slot_E, len(y)), y)


def grouped_linear_backward(
    grad_NF: Tensor,
    rows_ND: Tensor,
    w_SFD: Tensor,
    counts_E: Tensor,
    slot_E: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (rows, w, b); an empty tensor for those not asked for."""
    offsets, slots = counts_E.cumsum(0, dtype=torch.int32), len(w_SFD)
    live = _live_rows(counts_E, slot_E, len(rows_ND))
    grad, rows = _only(live, grad_NF), _only(live, rows_ND)
    d_rows = d_w = d_b = rows_ND.new_empty(0)
    if needs[0]:
        d_rows = _only(live, _product(grad, _of_slots(w_SFD, slot_E), offsets))
    if needs[1]:
        d_w = _to_slots(_outer(grad, rows, offsets), slot_E, slots)
        d_w = d_w.mT.contiguous().mT if is_transposed(w_SFD) else d_w.contiguous()
    if needs[2]:
        d_b = _to_slots(_bias_gradient(grad, counts_E), slot_E, slots)
    return d_rows, d_w, d_b


def grouped_mlp_pre(
    x_TD: Tensor, unit_N: Tensor, counts_E: Tensor, slot_E: Tensor | None, w1: Tensor, b1: Tensor | None
) -> Tensor:
    """The pre-activation that `grouped_mlp` saves, of the same bits."""
    pre = _pre(x_TD, unit_N, counts_E, slot_E, w1, b1)
    return F.pad(pre, (0, 0, 0, slack(pre.dtype)))


def _pre(
    x_TD: Tensor, unit_N: Tensor, counts_E: Tensor, slot_E: Tensor | None, w1: Tensor, b1: Tensor | None
) -> Tensor:
    rows_ND = gather_rows(x_TD, unit_N, counts_E)
    return grouped_linear(rows_ND, w1.flatten(1, -2), None if b1 is None else b1.flatten(1), counts_E, slot_E)


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
    save: bool,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y_TO, pre): pre is the pre-activation, (N + slack, F or 2F), empty without `save`."""
    act, gated = get_activation(activation), w1.dim() == 4
    pre = _pre(x_TD, unit_N, counts_E, slot_E, w1, b1)
    rows_NO = grouped_linear(hidden_forward(act, pre, gated), w2, b2, counts_E, slot_E)
    live = _live_rows(counts_E, slot_E, len(unit_N))
    weight_N = None if weight_N is None else _only(live[:, 0], weight_N)
    y_TO = scatter_combine(rows_NO, unit_N, weight_N, counts_E, len(x_TD), x_TD.dtype)
    return y_TO, F.pad(pre, (0, 0, 0, slack(pre.dtype))) if save else pre.new_empty(0, pre.shape[1])


def grouped_mlp_backward(
    grad_TO: Tensor,
    pre_N: Tensor,
    x_TD: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    slot_E: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, w1, b1, w2, b2); an empty tensor for those not asked for."""
    act, gated, size = get_activation(activation), w1.dim() == 4, len(unit_N)
    need_x, need_weight, need_w1, need_b1, need_w2, need_b2 = needs
    pre = pre_N[:size]
    hidden = hidden_forward(act, pre, gated)
    live = _live_rows(counts_E, slot_E, size)
    if weight_N is not None:
        weight_N = _only(live[:, 0], weight_N)
    rows_NO = grouped_linear(hidden, w2, b2, counts_E, slot_E) if need_weight else hidden
    d_rows, d_weight = scatter_combine_backward(
        grad_TO, rows_NO, unit_N, weight_N, counts_E, [True, need_weight]
    )
    need_pre = need_x or need_w1 or need_b1
    d_hidden, d_w2, d_b2 = grouped_linear_backward(
        d_rows, hidden, w2, counts_E, slot_E, [need_pre, need_w2, need_b2]
    )
    d_x = d_w1 = d_b1 = x_TD.new_empty(0)
    if need_pre:
        d_pre = hidden_backward(act, d_hidden, pre, gated)
        rows = gather_rows(x_TD, unit_N, counts_E)
        flat = w1.flatten(1, -2)
        d_in, d_w1, d_b1 = grouped_linear_backward(
            d_pre, rows, flat, counts_E, slot_E, [need_x, need_w1, need_b1]
        )
        d_x = gather_rows_backward(d_in, unit_N, counts_E, len(x_TD)) if need_x else d_x
        d_w1 = d_w1.view(w1.shape) if need_w1 else d_w1
        d_b1 = d_b1.view(w1.shape[:-1]) if need_b1 else d_b1
    return d_x, d_weight, d_w1, d_b1, d_w2, d_b2


KERNELS: dict[str, Kernel] = {
    "assign": assign,
    "gather_rows": gather_rows,
    "gather_rows_backward": gather_rows_backward,
    "grouped_linear": grouped_linear,
    "grouped_linear_backward": grouped_linear_backward,
    "scatter_combine": scatter_combine,
    "scatter_combine_backward": scatter_combine_backward,
    "grouped_mlp": grouped_mlp,
    "grouped_mlp_backward": grouped_mlp_backward,
    "grouped_mlp_pre": grouped_mlp_pre,
}
