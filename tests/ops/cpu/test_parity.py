"""The native grouped MLP against the naive loops in float64: every element within what rounding explains."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexpert import ops
from flexpert.ops import ACTIVATIONS, reference
from tests.ops.cpu.bounds import Bounds

pytestmark = pytest.mark.usefixtures("live")

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 7, 17, 33, 255]
LEAVES = ("x_TD", "weight_N", "w1", "b1", "w2", "b2")
SLOTS = {
    "own": {},
    "absent": {"slots": (0, -1, 1, -1)},
    "repeated": {"slots": (1, 0, 1, 1)},
    "permuted": {"slots": (3, 1, 0, 2)},
}


def dy_of(case):
    shape = len(case.x_TD), case.w2.shape[1]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(case.x_TD.dtype)


def truth(case, dy):
    """y and the gradients of all leaves, in float64."""
    true = case.double()
    y = reference.grouped_mlp(*true.args)
    leaves = true.leaves
    grads = torch.autograd.grad(
        y, list(leaves.values()), dy.double(), allow_unused=True, materialize_grads=True
    )
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def results(case, dy):
    y = ops.grouped_mlp(*case.args)
    grads = torch.autograd.grad(y, list(case.leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(case.leaves, grads, strict=True))}


def excess(got, want, bounds):
    """The largest error of any element, in units of the largest that rounding explains."""
    worst = {}
    for name, value in got.items():
        assert value.shape == want[name].shape, name
        ratio = (value.double() - want[name]).abs() / bounds.largest_error(name)
        worst[name] = float(ratio.nan_to_num(nan=torch.inf).max()) if value.numel() else 0.0
    return worst


def check(case):
    dy = dy_of(case)
    want, bounds = truth(case, dy), Bounds(case, dy)
    got = results(case, dy)
    worst = excess(got, want, bounds)
    assert max(worst.values()) <= 1, worst
    with torch.no_grad():
        alone = excess({"y": ops.grouped_mlp(*case.args)}, want, bounds)
    assert alone["y"] <= 1, "without backward"
    for name, leaf in case.leaves.items():
        assert got[name].dtype == leaf.dtype, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_options(make_case, activation, slots, gated, dtype):
    for biases, weighted in product((True, False, "b1", "b2"), (True, False)):
        case = make_case(
            counts=(9, 0, 35, 1), spare=3, activation=activation, gated=gated, biases=biases,
            weighted=weighted, dtype=dtype, **SLOTS[slots],
        )  # fmt: skip
        check(case)


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["model_dim", "hidden_dim", "output_dim", "tokens", "all"])
def test_corners(make_case, which, size, dtype):
    names = ["model_dim", "hidden_dim", "output_dim", "tokens"] if which == "all" else [which]
    shape = {"model_dim": 17, "hidden_dim": 33, "output_dim": 7, "tokens": 7, **dict.fromkeys(names, size)}
    for gated, counts in product((False, True), ((1,), (0, 0, 40), (33, 0, 7))):
        check(make_case(**shape, counts=counts, gated=gated, dtype=dtype))


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", [(66, 97, 0), (98, 74), (129, 16, 81), (235,)])
def test_several_blocks_of_rows(make_case, counts, gated, dtype):
    """Of 22 to 30 rows each, which the fp32 kernels of AVX-512 take in steps of five and six."""
    check(make_case(tokens=50, model_dim=70, hidden_dim=66, counts=counts, gated=gated, dtype=dtype))


@pytest.mark.each_cap
@settings(max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.sampled_from(SIZES),
    model_dim=st.sampled_from(SIZES),
    hidden_dim=st.sampled_from(SIZES),
    output_dim=st.sampled_from([None, *SIZES]),
    counts=st.lists(st.sampled_from([0, 1, 7, 17, 33, 64]), min_size=1, max_size=4).map(tuple),
    slots=st.none() | st.permutations((0, 1, 2, 1, -1)),
    spare=st.sampled_from([0, 7]),
    gated=st.booleans(),
    biases=st.sampled_from([True, False, "b1", "b2"]),
    weighted=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_call(make_case, counts, slots, **options):
    check(make_case(counts=counts, slots=slots and tuple(slots[: len(counts)]), **options))


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_every_set_of_gradients(make_case, gated, dtype):
    case = make_case(tokens=40, counts=(30, 0, 50, 3), slots=(0, 1, 2, 0), gated=gated, dtype=dtype)
    dy = dy_of(case)
    want, bounds = truth(case, dy), Bounds(case, dy)
    _, pre = torch.ops.flexpert.grouped_mlp(*case.args, True)
    args = dy, pre, *case.args[:6], case.w2, case.b2, case.activation
    for needs in product((False, True), repeat=6):
        with torch.no_grad():
            grads = torch.ops.flexpert.grouped_mlp_backward(*args, list(needs))
        given = {name: grad for name, grad, need in zip(LEAVES, grads, needs, strict=True) if need}
        assert all(grad.shape == (0,) for grad, need in zip(grads, needs, strict=True) if not need)
        worst = excess(given, want, bounds)
        assert max(worst.values(), default=0) <= 1, (needs, worst)


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(33,), (9, 0, 35, 1), (0, 300, 0), (64, 64, 64, 64), (700, 31, 0, 900)])
def test_same_bits_for_any_number_of_threads(make_case, threads, counts, dtype):
    case = make_case(tokens=70, model_dim=100, hidden_dim=290, counts=counts, gated=True, dtype=dtype)
    dy = dy_of(case)
    threads(1)
    want = results(case, dy)
    for number in (2, 3, 2):
        threads(number)
        for name, value in results(case, dy).items():
            assert torch.equal(value, want[name]), name


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_alone_are_as_experts_together(make_case, threads, dtype):
    """One thread takes each expert by itself, one of at most 256 rows in strips; two share all of them."""
    counts = (98, 33, 256, 40, 257)
    case = make_case(tokens=90, model_dim=150, hidden_dim=290, output_dim=97, counts=counts, dtype=dtype)
    threads(1)
    check(case)
    dy = dy_of(case)
    want = results(case, dy)
    threads(2)
    for name, value in results(case, dy).items():
        assert torch.equal(value, want[name]), name


# That the check would notice -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 17, 33])
def test_one_element_off_by_a_twentieth_is_noticed(make_case, size, dtype):
    """In fp32 any element above a hundredth of the largest; in bf16 the largest, itself rounded by 0.4 %."""
    case = make_case(tokens=size, model_dim=size, hidden_dim=size, counts=(size,), dtype=dtype)
    dy = dy_of(case)
    want, bounds = truth(case, dy), Bounds(case, dy)
    for name, value in want.items():
        noticed = 0.05 * value.abs() > 2 * bounds.largest_error(name)
        if dtype == torch.float32:
            assert noticed[100 * value.abs() >= value.abs().max()].all(), name
        else:
            assert noticed.flatten()[value.abs().argmax()], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_missing_row_is_noticed(make_case, gated, dtype):
    case = make_case(tokens=33, model_dim=255, hidden_dim=255, counts=(20, 44), gated=gated, dtype=dtype)
    dy = dy_of(case)
    without = case.weight_N.detach().clone()
    without[-1] = 0
    got = results(replace(case, weight_N=without.requires_grad_()), dy)
    worst = excess(got, truth(case, dy), Bounds(case, dy))
    assert {name for name, ratio in worst.items() if ratio > 1} == {"y", *LEAVES} - {"weight_N"}
