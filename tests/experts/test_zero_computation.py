"""Zero, copy and constant experts."""

from __future__ import annotations

import pytest
import torch

from flexpert.core.routing import Routing
from flexpert.experts import ConstantExperts, CopyExperts, ExpertBatch, ZeroExperts
from flexpert.testing import assert_close

D = 4
KINDS = [ZeroExperts, CopyExperts, ConstantExperts]


def expected(bank, slot, x):
    if isinstance(bank, ZeroExperts):
        return torch.zeros_like(x)
    if isinstance(bank, CopyExperts):
        return x
    share = torch.softmax(bank.weight[slot] @ x, 0)
    return share[0] * x + share[1] * bank.value[slot]


def make(kind, seed=0):
    torch.manual_seed(seed)
    return kind(num_experts=3, model_dim=D).double()


@pytest.mark.parametrize("slots", [None, [1, -1, 0], [2, 2, -1]])
@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_fused(kind, spare, slots):
    bank, counts = make(kind), [2, 3, 1]
    slot_E = None if slots is None else torch.tensor(slots)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    unit_N = torch.randint(5, (6 + spare,))
    weight_N = torch.rand(6 + spare, dtype=torch.float64, requires_grad=True)
    places = torch.repeat_interleave(torch.tensor(slots or range(3)), torch.tensor(counts)).tolist()
    rows = [
        expected(bank, slot, x[unit]) if slot >= 0 else torch.zeros(D, dtype=torch.float64)
        for slot, unit in zip(places, unit_N.tolist(), strict=False)
    ]
    rows += [torch.zeros(D, dtype=torch.float64)] * spare
    counts_E = torch.tensor(counts)
    got = bank(ExpertBatch(rows_ND=x[unit_N], counts_E=counts_E, unit_N=unit_N, slot_E=slot_E))
    assert_close(got, torch.stack(rows))

    routing = Routing(unit_N=unit_N, weight_N=weight_N, counts_E=counts_E, num_units=5)
    fused = bank.fused(x, routing, slot_E)
    want = torch.zeros(5, D, dtype=torch.float64)
    for row, unit, weight in zip(rows, unit_N.tolist(), weight_N, strict=True):
        want[unit] = want[unit] + weight * row
    assert_close(fused, want)
    if kind is not ZeroExperts:
        leaves, grad = [x, weight_N, *bank.parameters()], torch.randn_like(want)
        for a, b in zip(
            torch.autograd.grad(fused, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
        ):
            assert_close(a, b, scale=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(kind):
    bank = make(kind)
    x = torch.randn(4, D, dtype=torch.float64)
    x[2] = float("nan")
    unit_N, counts_E = torch.tensor([0, 2, 1, 3]), torch.tensor([2, 1, 1])
    routing = Routing(unit_N=unit_N, weight_N=torch.ones(4).double(), counts_E=counts_E, num_units=4)
    rows = bank(ExpertBatch(rows_ND=x[unit_N], counts_E=counts_E, unit_N=unit_N))
    assert rows[[0, 2, 3]].isfinite().all()
    assert bank.fused(x, routing)[[0, 1, 3]].isfinite().all()
    elsewhere = torch.tensor([-1, 0, 1])  # the token of NaN belongs to another bank
    assert bank.fused(x, routing, elsewhere).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_they_cost_nothing(kind):
    bank = make(kind)
    assert not bank.remote
    assert sum(bank.params_of_experts()) == sum(p.numel() for p in bank.parameters())
    assert bank.flops_of_experts() == [4 * D if kind is ConstantExperts else 0] * 3


def test_constant_starts_the_same_in_a_bank_of_any_size():
    torch.manual_seed(0)
    small = ConstantExperts(num_experts=2, model_dim=D)
    torch.manual_seed(0)
    large = ConstantExperts(num_experts=5, model_dim=D)
    assert torch.equal(small.weight, large.weight[:2])
    assert torch.equal(small.value, large.value[:2])
    assert small.weight.abs().max() <= D**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_results_keep_the_dtype(kind, dtype):
    bank = make(kind).float()
    x = torch.randn(4, D).to(dtype)
    routing = Routing(
        unit_N=torch.arange(4), weight_N=torch.rand(4), counts_E=torch.tensor([2, 1, 1]), num_units=4
    )
    assert bank.fused(x, routing).dtype == dtype
    assert bank(ExpertBatch(rows_ND=x, counts_E=routing.counts_E, unit_N=None)).dtype == dtype
