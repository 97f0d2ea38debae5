"""The fused MLP against the naive loops: forward, every gradient, odd shapes, poisoned rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexpert import ops
from flexpert.ops import ACTIVATIONS, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "ragged": {"counts": (3, 0, 5, 1)},
    "one token": {"tokens": 1, "counts": (0, 1, 1)},
    "no token": {"tokens": 0, "counts": (0, 0, 0)},
    "no rows, padded": {"counts": (0, 0), "spare": 3},
    "all to one": {"counts": (0, 0, 40)},
    "sizes of one": {"model_dim": 1, "hidden_dim": 1},
    "absent experts": {"counts": (3, 2, 0, 4, 1), "slots": (1, -1, -1, 0, 2), "spare": 2},
    "shared slots": {"counts": (3, 2, 4), "slots": (0, 1, 0)},
    "no biases": {"biases": False, "spare": 1},
    "no weights": {"weighted": False},
    "many rows": {"tokens": 150, "counts": (130, 257, 64), "model_dim": 64, "hidden_dim": 32},
    "turned and not": {"tokens": 60, "counts": (90, 7), "model_dim": 32, "hidden_dim": 160},
    "all at once": {
        "tokens": 33, "counts": (17, 0, 33, 7), "spare": 9, "slots": (2, -1, 1, 0), "output_dim": 5,
    },
}  # fmt: skip


def check(assert_same, case):
    true = case.double()
    assert_same(
        lambda: ops.grouped_mlp(*case.args),
        lambda: reference.grouped_mlp(*true.args),
        case.leaves,
        true.leaves,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_mlp(make_case, assert_same, shape, gated, dtype):
    check(assert_same, make_case(**SHAPES[shape], gated=gated, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_graph(make_case, assert_same, shape, gated, dtype):
    case = make_case(**SHAPES[shape], gated=gated, dtype=dtype)
    true = case.double()
    with torch.no_grad():
        got, want = ops.grouped_mlp(*case.args), reference.grouped_mlp(*true.args)
    assert_same(lambda: got, lambda: want, {}, {})


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(make_case, assert_same, activation, gated):
    check(assert_same, make_case(activation=activation, gated=gated))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.sampled_from([1, 7, 33]),
    model_dim=st.sampled_from([1, 7, 17, 33]),
    hidden_dim=st.sampled_from([1, 7, 17, 33]),
    output_dim=st.sampled_from([None, 1, 17]),
    counts=st.lists(st.integers(0, 17), min_size=1, max_size=5).map(tuple),
    spare=st.sampled_from([0, 1, 7]),
    gated=st.booleans(),
    biases=st.booleans(),
    weighted=st.booleans(),
)
def test_any_shape(make_case, assert_same, **shape):
    check(assert_same, make_case(**shape))


def test_only_what_is_asked_for_gets_a_gradient(make_case):
    case = make_case(counts=(4, 5), gated=True)
    true = case.double()
    dy = torch.randn(7, 17, dtype=torch.float64)
    for name, leaf in case.leaves.items():
        for other in case.leaves.values():
            other.requires_grad_(other is leaf)
        (got,) = torch.autograd.grad(ops.grouped_mlp(*case.args), leaf, dy)
        (want,) = torch.autograd.grad(reference.grouped_mlp(*true.args), getattr(true, name), dy)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_token_spoils_no_other(make_case, gated, dtype, bad):
    case = make_case(tokens=40, counts=(23, 0, 40, 17), dtype=dtype, gated=gated)
    with torch.no_grad():
        clean = ops.grouped_mlp(*case.args)
        case.x_TD[3] = bad
        dirty = ops.grouped_mlp(*case.args)
    others = torch.arange(40) != 3
    assert torch.equal(clean[others], dirty[others])
    assert not dirty[3].isfinite().all()


@pytest.mark.parametrize("gated", [False, True])
def test_dropped_rows_spread_nothing(make_case, gated):
    """Token 0 is NaN and has padding rows only, or rows of an absent expert; weights there are NaN too."""
    case = make_case(tokens=9, counts=(3, 4, 2), slots=(0, -1, 1), spare=5, gated=gated)
    case.unit_N[:] = 1 + torch.arange(len(case.unit_N)) % 8
    case.unit_N[3:7] = case.unit_N[9:] = 0
    with torch.no_grad():
        case.x_TD[0] = float("nan")
        case.weight_N[3:7] = case.weight_N[9:] = float("nan")
    y = ops.grouped_mlp(*case.args)
    assert y[0].eq(0).all()
    assert y.isfinite().all()
    for name, grad in zip(case.leaves, torch.autograd.grad(y.sum(), case.leaves.values()), strict=True):
        assert grad.isfinite().all(), name
