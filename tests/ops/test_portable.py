"""Row operators against the naive loops: forward, every gradient, odd shapes, poisoned padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert import ops
from flexpert.ops import reference
from flexpert.testing import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "ragged": {"counts": (3, 0, 5, 1)},
    "one token": {"tokens": 1, "counts": (0, 1, 1)},
    "no token": {"tokens": 0, "counts": (0, 0, 0)},
    "no rows": {"counts": (0, 0)},
    "no rows, padded": {"counts": (0, 0), "spare": 3},
    "all to one": {"counts": (0, 0, 40)},
    "padded": {"counts": (2, 7, 1), "spare": 5},
    "sizes of one": {"model_dim": 1, "hidden_dim": 1},
    "absent experts": {"counts": (3, 2, 0, 4, 1), "slots": (1, -1, -1, 0, 2), "spare": 2},
    "shared slots": {"counts": (3, 2, 4), "slots": (0, 1, 0)},
    "no biases": {"biases": False},
    "no weights": {"weighted": False},
    "other output": {"output_dim": 7},
    "all at once": {
        "tokens": 33, "counts": (17, 0, 33, 7), "spare": 9, "slots": (2, 0, 1, 0), "output_dim": 5,
    },
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_rows(make_case, assert_same, shape, dtype):
    case = make_case(**shape, dtype=dtype)
    true = case.double()
    assert_same(
        lambda: ops.gather_rows(case.x_TD, case.unit_N, case.counts_E),
        lambda: reference.gather_rows(true.x_TD, true.unit_N, true.counts_E),
        {"x": case.x_TD},
        {"x": true.x_TD},
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linear(make_case, assert_same, shape, dtype):
    case = make_case(**shape, dtype=dtype)
    rows = case.x_TD.detach()[case.unit_N] if len(case.x_TD) else case.x_TD.detach()
    rows.requires_grad_()
    got = {"rows": rows, "w": case.w1} | ({} if case.b1 is None else {"b": case.b1})
    want = {name: leaf.detach().double().requires_grad_() for name, leaf in got.items()}
    assert_same(
        lambda: ops.grouped_linear(got["rows"], got["w"], got.get("b"), case.counts_E, case.slot_E),
        lambda: reference.grouped_linear(want["rows"], want["w"], want.get("b"), case.counts_E, case.slot_E),
        got,
        want,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linear_of_transposed_weights_has_a_gradient_that_lies_as_they_do(dtype):
    torch.manual_seed(0)
    counts_E, slot_E = torch.tensor([3, 0, 4, 2]), torch.tensor([0, 1, 0, 2])
    stored = torch.randn(3, 6, 5).to(dtype).requires_grad_()  # (slots, in, out)
    rows = torch.randn(9, 6).to(dtype)
    y = ops.grouped_linear(rows, stored.mT, None, counts_E, slot_E)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert stored.grad is not None
    assert stored.grad.is_contiguous()
    op = torch.ops.flexpert.grouped_linear_backward
    w, needs = stored.detach().mT, [True, True, True]
    assert op(grad, rows, w, counts_E, slot_E, needs)[1].mT.is_contiguous()
    torch.library.opcheck(op, (grad, rows, w, counts_E, slot_E, needs))
    want = torch.zeros(3, 6, 5, dtype=torch.float64)
    for i, expert in enumerate(torch.arange(4).repeat_interleave(counts_E)):
        want[slot_E[expert]] += torch.outer(rows[i].double(), grad[i].double())
        assert_close(y[i], rows[i].double() @ stored[slot_E[expert]].double())
    assert_close(stored.grad, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_combine(make_case, assert_same, shape, dtype):
    case = make_case(**shape, dtype=dtype)
    rows = torch.randn(len(case.unit_N), 5).to(dtype).requires_grad_()
    got = {"rows": rows} | ({} if case.weight_N is None else {"weight": case.weight_N})
    want = {name: leaf.detach().double().requires_grad_() for name, leaf in got.items()}
    units = len(case.x_TD)

    def run(module, leaves, out_dtype):
        return module.scatter_combine(
            leaves["rows"], case.unit_N, leaves.get("weight"), case.counts_E, units, out_dtype
        )

    assert_same(lambda: run(ops, got, dtype), lambda: run(reference, want, torch.float64), got, want)


def test_scatter_combine_returns_the_dtype_asked_for(make_case):
    case = make_case(dtype=torch.bfloat16)
    args = case.x_TD[case.unit_N], case.unit_N, case.weight_N, case.counts_E, len(case.x_TD)
    got = ops.scatter_combine(*args, torch.float32)
    assert got.dtype == torch.float32
    want = reference.scatter_combine(*(a.double() if torch.is_tensor(a) and a.is_floating_point() else a
                                       for a in args), torch.float64)  # fmt: skip
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_sums_of_half_precision_rows_are_wide():
    ones = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    many, counts = torch.zeros(1000, dtype=torch.int64), torch.tensor([1000])
    rows = ops.gather_rows(ones, many, counts)
    assert ops.scatter_combine(rows, many, None, counts, 1, torch.bfloat16).item() == 1000
    assert torch.autograd.grad(rows.sum(), ones)[0].item() == 1000


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_assign(data):
    num_bins = data.draw(st.integers(0, 9))
    keys = data.draw(st.lists(st.integers(-2, num_bins + 2), max_size=40))
    capacity = data.draw(st.none() | st.lists(st.integers(0, 6), min_size=num_bins, max_size=num_bins))
    key_N = torch.tensor(keys, dtype=torch.int64)
    capacity_B = None if capacity is None else torch.tensor(capacity, dtype=torch.int64)
    order, counts = ops.assign(key_N, num_bins, capacity_B)
    want_order, want_counts = reference.assign(key_N, num_bins, capacity_B)
    assert order.dtype == counts.dtype == torch.int64
    assert order.tolist() == want_order.tolist()
    assert counts.tolist() == want_counts.tolist()


def test_assign_by_hand():
    key = torch.tensor([1, 5, 0, 1, -1, 1, 0])
    order, counts = ops.assign(key, 3, torch.tensor([9, 2, 0]))
    assert order.tolist() == [2, 6, 0, 3, 1, 4, 5]
    assert counts.tolist() == [2, 2, 0]


def test_nothing_reads_the_rows_past_the_total(make_case):
    case = make_case(counts=(2, 3), spare=4, weighted=True)
    total, nan = case.total, float("nan")
    rows = case.x_TD.detach()[case.unit_N]
    rows[total:] = nan
    weight = case.weight_N.detach().clone()
    weight[total:] = nan
    leaves = rows.requires_grad_(), weight.requires_grad_(), case.w1
    y = ops.grouped_linear(rows, case.w1, case.b1, case.counts_E)
    out = ops.scatter_combine(rows, case.unit_N, weight, case.counts_E, 7, torch.float64)
    gathered = ops.gather_rows(case.x_TD, case.unit_N, case.counts_E)
    assert y[total:].eq(0).all()
    assert gathered[total:].eq(0).all()
    assert out.isfinite().all()
    assert y.isfinite().all()
    poison = torch.zeros_like(gathered)
    poison[total:] = nan
    grads = torch.autograd.grad([y, out, gathered], [*leaves, case.x_TD], [
        torch.ones_like(y).index_fill(0, torch.arange(total, total + 4), nan), torch.ones_like(out), poison,
    ])  # fmt: skip
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][total:].eq(0).all()
    assert grads[1][total:].eq(0).all()
