"""Native rows: gathered, summed back and differentiated as in float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexpert import ops
from flexpert.core.errors import InputError
from flexpert.ops import portable, reference

pytestmark = [pytest.mark.usefixtures("live", "poisoned"), pytest.mark.each_cap]

ANY_SHAPE = settings(
    max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = [torch.float32, torch.bfloat16]


def make(tokens, size, counts, spare, dtype, weighted, seed=0):
    draw = torch.Generator().manual_seed(seed)
    total = sum(counts) if tokens else 0
    unit = torch.randint(max(tokens, 1), (total,), generator=draw)
    rows = total + spare
    return {
        "x": torch.randn(tokens, size, generator=draw).to(dtype).requires_grad_(),
        "rows": torch.randn(rows, size, generator=draw).to(dtype).requires_grad_(),
        "unit": torch.cat([unit, torch.full((spare,), -7)]),  # never read
        "weight": torch.rand(rows, generator=draw).requires_grad_() if weighted else None,
        "counts": torch.tensor(counts if tokens else [0]),
    }


def wide(tensors):
    """The floating ones in float64, as leaves."""
    return {
        name: t.detach().double().requires_grad_() if t is not None and t.is_floating_point() else t
        for name, t in tensors.items()
    }


def results(module, t, gradient):
    """Rows, sums and every gradient, of one module's operators."""
    units, dtype = len(t["x"]), t["rows"].dtype
    rows = module.gather_rows(t["x"], t["unit"], t["counts"])
    y = module.scatter_combine(t["rows"], t["unit"], t["weight"], t["counts"], units, dtype)
    leaves = [t["x"], t["rows"], *([] if t["weight"] is None else [t["weight"]])]
    outputs = [(rows, torch.full_like(rows, 0.5)), (y, gradient.to(dtype))]
    outputs = list(zip(*[pair for pair in outputs if pair[0].requires_grad], strict=True))
    return [
        rows,
        y,
        *torch.autograd.grad(outputs[0], leaves, outputs[1], allow_unused=True, materialize_grads=True),
    ]


@ANY_SHAPE
@given(
    tokens=st.sampled_from([0, 1, 2, 9, 40]),
    size=st.sampled_from([1, 3, 15, 16, 17, 33, 64]),
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    spare=st.sampled_from([0, 4]),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
)
def test_any_shape(tokens, size, counts, spare, dtype, weighted):
    t = make(tokens, size, counts, spare, dtype, weighted)
    gradient = torch.randn(tokens, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    pairs = zip(results(ops, t, gradient), results(reference, wide(t), gradient), strict=True)
    for mine, true in pairs:
        tolerance = 1e-5 if mine.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(threads, dtype):
    t = make(700, 65, [900, 0, 1100], 50, dtype, weighted=True)
    gradient = torch.randn(700, 65).to(dtype)
    threads(1)
    want = results(ops, t, gradient)
    for number in (2, 3, 7):
        threads(number)
        for mine, true in zip(results(ops, t, gradient), want, strict=True):
            assert torch.equal(mine, true)


def test_inputs_of_any_strides_and_gradients_that_are_expanded():
    t = make(9, 6, [4, 5], 2, torch.float32, weighted=True)
    want = results(ops, t, torch.ones(9, 6))
    turned = {
        "x": t["x"].detach().T.contiguous().T.requires_grad_(),
        "rows": t["rows"].detach().T.contiguous().T.requires_grad_(),
        "unit": t["unit"].repeat_interleave(2)[::2],
        "weight": t["weight"].detach().repeat_interleave(2)[::2].requires_grad_(),
        "counts": t["counts"].repeat_interleave(2)[::2],
    }
    for mine, true in zip(results(ops, turned, torch.ones(()).expand(9, 6)), want, strict=True):
        assert torch.equal(mine, true)


def test_half_precision_rounds_as_pytorch_does():
    rows = torch.tensor([[1.00390625, 3.0e38, -3.0e38, float("inf"), float("nan"), 1.0]]).bfloat16()
    weight, unit, counts = torch.tensor([1.00390625]), torch.tensor([0]), torch.tensor([1])
    y = ops.scatter_combine(rows, unit, weight, counts, 1, torch.bfloat16)
    want = (rows.float() * weight).bfloat16()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(), want.nan_to_num())


def test_other_dtypes_of_weight_and_result_go_another_way():
    t = make(5, 4, [3, 4], 1, torch.bfloat16, weighted=True)
    args = t["rows"].detach(), t["unit"], t["weight"].detach().double(), t["counts"], 5
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(ops.scatter_combine(*args, dtype), portable.scatter_combine(*args, dtype))


def test_what_does_not_fit_is_refused():
    x, unit, counts = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([2])
    with pytest.raises(InputError, match=r"unit_N has an index outside \[0, T\)"):
        ops.gather_rows(x, unit + 1, counts)
    with pytest.raises(InputError, match="gather_rows: .* counts_E does not add up"):
        ops.gather_rows(x, unit, counts + 1)
    with pytest.raises(InputError, match="unit_N is torch.int32"):
        ops.gather_rows(x, unit.int(), counts)
    with pytest.raises(InputError, match="weight_N is"):
        ops.scatter_combine(x, unit, torch.ones(3), counts, 2, torch.float32)
