"""Weighted gathers and sums: exact weights in half precision, zeros where there is nothing."""

from __future__ import annotations

import pytest
import torch

from flexpert.ops.bags import RowSource, sum_rows, sum_runs

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_take_gives_the_segment_and_then_zeros(dtype, weighted):
    x = torch.randn(6, 5).to(dtype)
    unit = torch.tensor([5, 0, 0, 3, 2])
    weight = torch.rand(5, dtype=torch.promote_types(dtype, torch.float32)) if weighted else None
    got = RowSource(x, unit, weight).take(1, 4, 7)
    want = x[unit[1:4]].double() * (1 if weight is None else weight[1:4, None].double())
    assert got.dtype == dtype
    assert torch.equal(got[:3], want.to(dtype))
    assert got.shape == (7, 5)
    assert got[3:].eq(0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_sums_round_once(dtype):
    """Rows, weights and sum as exact as one rounding of the true sum: no weight is rounded to the dtype."""
    rows = torch.randn(400, 33).to(dtype)
    unit, weight = torch.randint(9, (400,)), torch.rand(400)
    true = torch.zeros(9, 33, dtype=torch.float64).index_add_(
        0, unit, rows.double() * weight[:, None].double()
    )
    got = sum_rows(rows, unit, weight, None, 9)
    least = (true.to(dtype).double() - true).norm()
    assert (got.double() - true).norm() <= 1.01 * least
    rounded = rows.double() * weight.to(dtype)[:, None].double()
    coarse = torch.zeros_like(true).index_add_(0, unit, rounded)
    assert (coarse - true).norm() > 0.3 * least  # what rounded weights alone would cost is not small


def test_only_kept_rows_are_read():
    rows = torch.ones(4, 2)
    rows[1] = float("nan")
    got = sum_rows(rows, torch.tensor([0, 1, 1, 2]), None, torch.tensor([0, 2, 3]), 4)
    assert got.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize("units", [0, 3])
def test_no_rows(units):
    nothing = torch.empty(0, dtype=torch.int64)
    assert torch.equal(sum_rows(torch.empty(0, 2), nothing, None, None, units), torch.zeros(units, 2))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_runs_read_nothing_past_the_last_edge(dtype, weighted):
    rows = torch.randn(9, 5).to(dtype)
    rows[7:] = float("nan")
    weight = torch.rand(7) if weighted else None
    scaled = rows.double() * (1 if weight is None else torch.cat([weight, weight[:2]])[:, None])
    got = sum_runs(rows, weight, torch.tensor([0, 4, 4, 7]))
    want = torch.stack([scaled[:4].sum(0), torch.zeros(5), scaled[4:7].sum(0)])
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= torch.finfo(dtype).eps * want.norm()
