"""The fused MLP against the naive loops: forward, every gradient, odd shapes, poisoned rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexpert import ops
from flexpert.ops import ACTIVATIONS, portable_mlp, reference, waves

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


# Waves of WAVE rows: experts of one row, of a wave or more, none; spare rows (in half precision) over several
# experts, and over the ends of waves and of all rows.
WAVE = 40
WAVES = {
    "tiny experts": {"counts": (1, 3) * 30},
    "empty experts between": {"counts": (0, 9, 0, 0, 33, 1, 0, 21, 35, 0, 2), "spare": 3},
    "large among small": {"counts": (5, 70, 3, 40, 39, 1, 40, 90)},
    "spare rows of many": {"counts": (33, 1, 1, 1, 34, 1, 2, 33, 1)},
    "slots repeat": {"counts": (9, 3, 33, 9, 1, 45, 17, 2, 8), "slots": (1, 0, 1, 1, 2, 0, 2, 1, 3)},
    "one slot": {"counts": (3,) * 30, "slots": (0,) * 30, "spare": 1},
    "absent between": {"counts": (9, 30, 3, 7, 50, 0, 2), "slots": (0, -1, 2, 1, -1, -1, 0), "spare": 70},
    "bare": {"counts": (9, 3, 33, 9, 1, 45), "biases": False, "weighted": False, "output_dim": 5},
}  # fmt: skip


@pytest.fixture
def small_waves(monkeypatch):
    monkeypatch.setattr(waves, "WAVE_ROWS", WAVE)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", WAVES)
def test_waves(make_case, assert_same, small_waves, poisoned, shape, gated, dtype):
    case = make_case(tokens=25, **WAVES[shape], gated=gated, dtype=dtype)
    check(assert_same, case)
    with torch.no_grad():
        got, want = ops.grouped_mlp(*case.args), reference.grouped_mlp(*case.double().args)
    assert_same(lambda: got, lambda: want, {}, {})


def test_waves_of_the_usual_size(make_case, assert_same):
    case = make_case(tokens=300, counts=(100,) * 12 + (1024, 3, 1500, 600), dtype=torch.bfloat16)
    assert len(list(waves.waves(case.counts_E, None, torch.bfloat16))) == 6
    check(assert_same, case)


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


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_row_spoils_no_other_expert(make_case, small_waves, gated, dtype):
    """Rows of one wave meet in the products of other experts, as spare rows: never in their gradients."""
    case = make_case(tokens=90, counts=(17, 5, 0, 33, 1, 9, 20, 3), gated=gated, dtype=dtype)
    case.unit_N[:] = torch.arange(88)

    def gradients():
        y = ops.grouped_mlp(*case.args)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        return [y, *torch.autograd.grad(y, list(case.leaves.values()), dy)]

    clean = gradients()
    with torch.no_grad():
        case.x_TD[18] = float("nan")  # a row of expert 1
    dirty = gradients()
    units, experts = torch.arange(90) != 18, torch.arange(8) != 1
    names = ["y", *case.leaves]
    for name, before, after in zip(names, clean, dirty, strict=True):
        others = {"y": units, "x_TD": units, "weight_N": units[:88]}.get(name, experts)
        assert torch.equal(before[others], after[others]), name
        assert name == "b2" or not after[~others].isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pre_has_the_rows_in_their_order(make_case, small_waves, poisoned, dtype):
    case = make_case(tokens=25, counts=(9, 0, 33, 4, 21), slots=(0, 1, -1, 1, 0), spare=5, dtype=dtype)
    with torch.no_grad():
        _, pre = portable_mlp.grouped_mlp(*case.args, save=True)
        rows = reference.gather_rows(case.x_TD, case.unit_N, case.counts_E)
        want = reference.grouped_linear(rows, case.w1, case.b1, case.counts_E, case.slot_E)
    assert pre[9:42].eq(0).all()
    assert pre[67:].eq(0).all()
    tolerance = 2 * torch.finfo(dtype).eps
    assert (pre[:67].double() - want[:67].double()).norm() <= tolerance * want.double().norm()
