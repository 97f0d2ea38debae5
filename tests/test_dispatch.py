"""Dispatch and combine of a routing's rows, ragged and soft, against plain loops."""

from __future__ import annotations

import pytest
import torch

from flexpert import DenseRouting, Routing
from flexpert.dispatch import gather, scatter
from flexpert.testing import assert_close

D = 5


def ragged(spare=0, dtype=torch.float64):
    unit_N = torch.tensor([3, 0, 0, 2, 3, 1] + [0] * spare)
    return Routing(
        unit_N=unit_N,
        weight_N=torch.rand(6 + spare, dtype=dtype).requires_grad_(),
        counts_E=torch.tensor([2, 0, 4]),
        num_units=5,  # token 4 goes nowhere
    )


def soft(batch=2, length=3, slots=4, dtype=torch.float64):
    return DenseRouting(
        dispatch_BSP=torch.rand(batch, length, slots, dtype=dtype).requires_grad_(),
        combine_BSP=torch.rand(batch, length, slots, dtype=dtype).requires_grad_(),
        counts_E=torch.tensor([batch * slots // 2] * 2),
        num_units=batch * length,
    )


@pytest.mark.parametrize("spare", [0, 3])
def test_ragged_rows(spare):
    routing = ragged(spare)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    rows = gather(x, routing)
    assert_close(rows[:6], x[routing.unit_N[:6]])
    assert rows[6:].count_nonzero() == 0
    (grad,) = torch.autograd.grad(rows, x, torch.ones_like(rows))
    assert grad[:, 0].tolist() == [2, 1, 1, 2, 0]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("spare", [0, 3])
def test_ragged_sums(spare, given):
    routing = ragged(spare)
    rows = torch.randn(6 + spare, D, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6 + spare, dtype=torch.float64, requires_grad=True) if given else routing.weight_N
    y = scatter(rows, routing, torch.float64, weight if given else None)
    want = torch.zeros(5, D, dtype=torch.float64)
    for i, unit in enumerate(routing.unit_N[:6].tolist()):
        want[unit] = want[unit] + weight[i] * rows[i]
    assert_close(y, want)
    assert y[4].count_nonzero() == 0
    grad = torch.randn(5, D, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(y, [rows, weight], grad),
        torch.autograd.grad(want, [rows, weight], grad),
        strict=True,
    ):
        assert_close(a, b)


def test_soft_rows_and_sums():
    routing, x = soft(), torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    rows = gather(x, routing)
    want = [
        sum(routing.dispatch_BSP[b, s, p] * x[3 * b + s] for s in range(3))
        for p in range(4)
        for b in range(2)
    ]
    assert_close(rows, torch.stack(want))  # slots of one expert lie together
    results = torch.randn(8, 7, dtype=torch.float64, requires_grad=True)
    y = scatter(results, routing, torch.float64)
    sums = [
        sum(routing.combine_BSP[b, s, p] * results[2 * p + b] for p in range(4))
        for b in range(2)
        for s in range(3)
    ]
    assert_close(y, torch.stack(sums))


@pytest.mark.parametrize("make", [ragged, soft])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_single_precision(make, dtype):
    routing = make(dtype=torch.float32)
    rows = torch.randn(6 if make is ragged else 8, D).to(dtype)
    y = scatter(rows, routing, torch.float32)
    assert_close(y, scatter(rows.double(), make_double(routing), torch.float64))
    assert scatter(rows, routing, dtype).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scatter(rows, routing, torch.float32), y)
        x = torch.randn(routing.num_units, D).to(dtype)
        assert gather(x, routing).dtype == dtype


def make_double(routing):
    if isinstance(routing, DenseRouting):
        return DenseRouting(
            dispatch_BSP=routing.dispatch_BSP.double(),
            combine_BSP=routing.combine_BSP.double(),
            counts_E=routing.counts_E,
            num_units=routing.num_units,
        )
    return Routing(
        unit_N=routing.unit_N,
        weight_N=routing.weight_N.double(),
        counts_E=routing.counts_E,
        num_units=routing.num_units,
    )


def test_nothing():
    empty = soft(batch=0)
    x = torch.zeros(0, D, dtype=torch.float64)
    assert gather(x, empty).shape == (0, D)
    assert scatter(torch.zeros(0, 3).double(), empty, torch.float64).shape == (0, 3)
