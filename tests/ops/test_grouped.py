"""The backend for devices, run on the CPU: against the naive loops, and without a value read on the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexpert import ops
from flexpert.ops import reference, select

SHAPES = {
    "ragged": {"counts": (3, 0, 5, 1)},
    "one token": {"tokens": 1, "counts": (0, 1, 1)},
    "all to one": {"counts": (0, 0, 40)},
    "aligned": {"model_dim": 16, "hidden_dim": 8, "counts": (2, 7, 1), "spare": 5},
    "absent experts": {"counts": (3, 2, 0, 4, 1), "slots": (1, -1, -1, 0, 2), "spare": 2},
    "shared slots": {"counts": (3, 2, 4), "slots": (0, 1, 0), "output_dim": 5},
    "no biases, no weights": {"biases": False, "weighted": False, "spare": 1},
}


@pytest.fixture(autouse=True)
def _grouped_mm_everywhere(monkeypatch):
    backend = replace(select.GROUPED_MM, verify=lambda facts: None)
    monkeypatch.setattr(select, "BACKENDS", [backend])
    with ops.use_backend("grouped_mm"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_mlp(make_case, assert_same, shape, gated, dtype):
    case = make_case(**SHAPES[shape], gated=gated, dtype=dtype)
    true = case.double()
    assert_same(
        lambda: ops.grouped_mlp(*case.args),
        lambda: reference.grouped_mlp(*true.args),
        case.leaves,
        true.leaves,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_parts(make_case, assert_same, shape):
    case = make_case(**SHAPES[shape], dtype=torch.float32)
    true = case.double()

    def run(module, one, dtype):
        rows = module.gather_rows(one.x_TD, one.unit_N, one.counts_E)
        rows = module.grouped_linear(rows, one.w1, one.b1, one.counts_E, one.slot_E)
        return module.scatter_combine(rows, one.unit_N, one.weight_N, one.counts_E, len(one.x_TD), dtype)

    def used(one):
        return {name: leaf for name, leaf in one.leaves.items() if name not in ("w2", "b2")}

    assert_same(
        lambda: run(ops, case, torch.float32),
        lambda: run(reference, true, torch.float64),
        used(case),
        used(true),
    )


def test_rows_past_the_total_or_absent_spread_nothing(make_case):
    case = make_case(tokens=9, counts=(3, 4, 2), slots=(0, -1, 1), spare=5, dtype=torch.float32)
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


def test_nothing_depends_on_a_value(make_case):
    """Fake tensors have none: a kernel that reads one, or derives a shape from one, fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = make_case(model_dim=16, hidden_dim=16, slots=(1, -1, 0, 2), dtype=torch.bfloat16, gated=True)
    mode = FakeTensorMode()
    args = [mode.from_tensor(a.detach()) if torch.is_tensor(a) else a for a in case.args]
    with mode:
        kernels = select.GROUPED_MM.kernels
        y, pre = kernels["grouped_mlp"](*args, True)
        kernels["assign"](args[1], 4, args[3])
        x, unit, weight, counts, slot, w1, _, w2, b2, activation = args
        grads = kernels["grouped_mlp_backward"](
            y, pre, x, unit, weight, counts, slot, w1, w2, b2, activation, [True] * 6
        )
    wanted = (case.x_TD, case.weight_N, case.w1, case.b1, case.w2, case.b2)
    assert [tuple(grad.shape) for grad in grads] == [tuple(want.shape) for want in wanted]
