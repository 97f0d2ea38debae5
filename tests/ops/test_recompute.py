"""The hidden layer computed again in backward: the bits of the one that is kept, and nothing kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flexpert import ops
from flexpert.core.errors import FlexpertError
from flexpert.ops import portable_mlp, select, waves

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SHAPES = {
    "ragged": {"counts": (3, 0, 5, 1)},
    "no token": {"tokens": 0, "counts": (0, 0)},
    "absent experts": {"counts": (3, 2, 0, 4, 1), "slots": (1, -1, -1, 0, 2), "spare": 2},
    "several waves": {"tokens": 50, "counts": (9, 3, 33, 9, 1, 45), "slots": (1, 0, 1, -1, 2, 0), "spare": 9},
    "turned": {"tokens": 60, "counts": (90, 7), "model_dim": 32, "hidden_dim": 160},
    "bare": {"counts": (9, 0, 4), "biases": False, "weighted": False, "output_dim": 5},
    "bias of the output": {"counts": (2, 4), "biases": "b2", "spare": 1},
}
SMALL = {"tokens": 5, "model_dim": 3, "hidden_dim": 4, "output_dim": 2, "counts": (2, 0, 3), "spare": 2}


@pytest.fixture(params=["portable", "grouped_mm"])
def backend(request, monkeypatch):
    """Each backend that runs everywhere."""
    monkeypatch.setattr(waves, "WAVE_ROWS", 40)
    grouped = replace(select.GROUPED_MM, verify=lambda facts: None)
    monkeypatch.setattr(select, "BACKENDS", [grouped, select.PORTABLE])
    with ops.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits(make_case, assert_recomputes, backend, poisoned, shape, gated, dtype):
    if backend == "grouped_mm" and dtype == torch.float64:
        pytest.skip("F.grouped_mm has no fp64")
    assert_recomputes(make_case(**SHAPES[shape], gated=gated, dtype=dtype))


@pytest.mark.parametrize("name", ["x_TD", "weight_N", "w1", "b1", "w2", "b2"])
def test_one_gradient_alone(make_case, name):
    case = make_case(**SMALL, gated=True)
    grads = []
    for other in case.leaves.values():
        other.requires_grad_(other is getattr(case, name))
    for recompute in (False, True):
        y = ops.grouped_mlp(*case.args, recompute=recompute)
        grads += torch.autograd.grad(y.square().sum(), getattr(case, name))
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # what the second imports
@pytest.mark.parametrize("partition", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_compiled(make_case, assert_recomputes, gated, dtype, partition):
    torch._dynamo.reset()
    case = make_case(tokens=9, counts=(8, 0, 17), gated=gated, dtype=dtype)
    assert_recomputes(case, torch.compile(ops.grouped_mlp, fullgraph=True, backend=partition))


def test_inside_a_checkpoint(make_case):
    case = make_case(**SHAPES["turned"], dtype=torch.bfloat16)
    leaves, results = list(case.leaves.values()), []
    for recompute in (False, True):
        y = checkpoint(ops.grouped_mlp, *case.args, recompute=recompute, use_reentrant=False)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_forward_is_not_run_again(make_case, monkeypatch):
    case, calls = make_case(**SMALL), []

    def spied(name):
        kernel = select.PORTABLE.kernels[name]
        return lambda *args: calls.append(name) or kernel(*args)

    spy = select.Backend(
        name="spy", kernels={name: spied(name) for name in portable_mlp.KERNELS}, verify=lambda facts: None
    )
    monkeypatch.setattr(select, "BACKENDS", [spy])
    with ops.use_backend("spy"):
        ops.grouped_mlp(*case.args, recompute=True).sum().backward()
        with torch.no_grad():
            ops.grouped_mlp(*case.args, recompute=True)
    assert calls == ["grouped_mlp", "grouped_mlp_pre", "grouped_mlp_backward", "grouped_mlp"]


def test_second_derivatives_are_refused(make_case):
    case = make_case(**SMALL)
    leaves = list(case.leaves.values())
    y = ops.grouped_mlp(*case.args, recompute=True)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(FlexpertError, match="flexpert::grouped_mlp cannot be differentiated twice"):
        torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(make_case, backend, gated, dtype):
    case = make_case(**SMALL, gated=gated, dtype=dtype, slots=(1, 0, -1))
    operators = torch.ops.flexpert
    torch.library.opcheck(operators.grouped_mlp, (*case.args, False, True))
    with torch.no_grad():
        torch.library.opcheck(
            operators.grouped_mlp_pre,
            (case.x_TD, case.unit_N, case.counts_E, case.slot_E, case.w1, case.b1),
        )
