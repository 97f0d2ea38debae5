"""Native rows: gathered by unit and summed back by weight, each in one call into the library."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from flexpert.ops import portable
from flexpert.ops.backend import Kernel
from flexpert.ops.memory import empty

from .calls import check, run
from .threads import num_threads

_ROWS = struct.Struct("=11q")  # the fields of RowsCall in csrc/rows.h


def _run(
    name: str,
    units_UD: Tensor,
    rows_ND: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    d_weight_N: Tensor | None = None,
) -> None:
    """`units_UD` and `rows_ND` are contiguous and of one dtype; one of them, or `d_weight_N`, is written."""
    rows = unit_N.shape
    check(
        name,
        unit_N=(unit_N, (rows.numel(),), torch.int64),
        rows=(rows_ND, (*rows, units_UD.shape[1]), units_UD.dtype),
        counts_E=(counts_E, (counts_E.numel(),), torch.int64),
    )
    unit_N, counts_E, weight = unit_N.contiguous(), counts_E.contiguous(), 0
    if weight_N is not None:
        check(name, weight_N=(weight_N, tuple(rows), torch.float32))
        weight_N = weight_N.contiguous()
        weight = weight_N.data_ptr()
    call = _ROWS.pack(
        *units_UD.shape[:1], *rows, units_UD.shape[1], counts_E.shape[0], num_threads(), units_UD.data_ptr(),
        rows_ND.data_ptr(), unit_N.data_ptr(), weight, counts_E.data_ptr(),
        0 if d_weight_N is None else d_weight_N.data_ptr(),
    )  # fmt: skip
    run(name, call, units_UD.dtype == torch.bfloat16, refusal=_REFUSAL)


_REFUSAL = "unit_N has an index outside [0, T), or counts_E does not add up to rows of it"


def gather_rows(x_TD: Tensor, unit_N: Tensor, counts_E: Tensor) -> Tensor:
    """Zeros past the total."""
    rows_ND = empty(x_TD, (len(unit_N), x_TD.shape[1]))
    _run("gather_rows", x_TD.contiguous(), rows_ND, unit_N, None, counts_E)
    return rows_ND


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
    """The weighted sum over the rows of each unit."""
    if dtype != rows_NO.dtype or (weight_N is not None and weight_N.dtype != torch.float32):
        return portable.scatter_combine(rows_NO, unit_N, weight_N, counts_E, num_units, dtype)
    y_UO = empty(rows_NO, (num_units, rows_NO.shape[1]))
    _run("sum_rows", y_UO, rows_NO.contiguous(), unit_N, weight_N, counts_E)
    return y_UO


def scatter_combine_backward(
    grad_UO: Tensor,
    rows_NO: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of (rows, weight); an empty tensor for those not asked for."""
    if grad_UO.dtype != rows_NO.dtype or (weight_N is not None and weight_N.dtype != torch.float32):
        return portable.scatter_combine_backward(grad_UO, rows_NO, unit_N, weight_N, counts_E, needs)
    grad_UO = grad_UO.contiguous()
    d_rows, d_weight = rows_NO.new_empty(0), grad_UO.new_empty(0)
    if needs[1] and weight_N is not None:
        d_weight = weight_N.new_empty(weight_N.shape)
        _run("row_dots", grad_UO, rows_NO.contiguous(), unit_N, None, counts_E, d_weight)
    if needs[0]:
        d_rows = empty(rows_NO, rows_NO.shape)
        _run("gather_rows", grad_UO, d_rows, unit_N, weight_N, counts_E)
    return d_rows, d_weight


KERNELS: dict[str, Kernel] = {
    "gather_rows": gather_rows,
    "gather_rows_backward": gather_rows_backward,
    "scatter_combine": scatter_combine,
    "scatter_combine_backward": scatter_combine_backward,
}
