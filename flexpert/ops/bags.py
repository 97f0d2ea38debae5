"""Gathering rows by unit and summing them back, both as bags of rows with fp32 weights.

`embedding_bag` reads each row once, accumulates in fp32 (fp64 for fp64) and rounds once. It wants weights of
the rows' dtype: in half precision every weight is given as two terms, high and low, that carry its first 16
bits or more.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are accumulated in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _bags(rows: Tensor, index: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
    """Sum of weight[j] * rows[index[j]] over edges[i] <= j < edges[i + 1], for every i."""
    return torch.embedding_bag(rows, index, edges, False, 0, False, weight, True)[0]


def _terms(index: Tensor, weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, int]:
    """(index, weight, terms per entry) with the weight in `dtype`, as a sum of terms if it does not fit."""
    if weight is None or weight.dtype == dtype:
        return index, weight, 1
    high = weight.to(dtype)
    low = (weight - high).to(dtype)
    return index.repeat_interleave(2), torch.stack([high, low], 1).view(-1), 2


class RowSource:
    """Gathers rows weight_N[i] * x[unit_N[i]] of one segment at a time.

    Args:
        x_TD: what is gathered from.
        unit_N: int64.
        weight_N: fp32 or fp64 factors; None stands for ones.
    """

    def __init__(self, x_TD: Tensor, unit_N: Tensor, weight_N: Tensor | None = None) -> None:
        self.x_TD = x_TD
        self.index, self.weight, self.terms = _terms(unit_N, weight_N, x_TD.dtype)

    def take(self, start: int, stop: int, size: int) -> Tensor:
        """Rows start to stop, followed by zeros up to `size` rows."""
        terms, device = self.terms, self.index.device
        edges = torch.arange(0, terms * (size + 1), terms, device=device)
        if size > stop - start:
            edges.clamp_(max=terms * (stop - start))
        part = slice(start * terms, stop * terms)
        return _bags(self.x_TD, self.index[part], edges, None if self.weight is None else self.weight[part])


def sum_rows(
    rows_ND: Tensor, unit_N: Tensor, weight_N: Tensor | None, kept: Tensor | None, num_units: int
) -> Tensor:
    """y[u] = sum of weight_N[i] * rows[i] over the rows i of unit u; over those in `kept`, if given.

    unit_N may be shorter than the rows: those past it are not read.
    """
    units = unit_N if kept is None else unit_N[kept]
    sorted_units, order = torch.sort(units, stable=True)
    edges = torch.searchsorted(sorted_units, torch.arange(num_units + 1, device=units.device))
    index = order if kept is None else kept[order]
    index, weight, terms = _terms(index, None if weight_N is None else weight_N[index], rows_ND.dtype)
    return _bags(rows_ND, index, edges * terms, weight)


def sum_here(
    rows_ND: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    slot_E: Tensor | None,
    num_units: int,
) -> Tensor:
    """`sum_rows` over the rows of experts that have a slot; rows past counts_E.sum() are not read."""
    total = int(counts_E.sum())
    kept = None if slot_E is None else (slot_E >= 0).repeat_interleave(counts_E).nonzero()[:, 0]
    return sum_rows(rows_ND, unit_N[:total], None if weight_N is None else weight_N[:total], kept, num_units)


def sum_runs(rows_ND: Tensor, weight_N: Tensor | None, edges: Tensor) -> Tensor:
    """y[i] = sum of weight_N[j] * rows[j] over edges[i] <= j < edges[i + 1].

    The rows may be more than the weights and the last edge: those past it are not read.
    """
    index = torch.arange(len(rows_ND) if weight_N is None else len(weight_N), device=rows_ND.device)
    index, weight, terms = _terms(index, weight_N, rows_ND.dtype)
    return _bags(rows_ND, index, edges * terms, weight)
