"""The native kernels in their place: contracts of the operator; whole layers, compiled and recomputed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flexpert import MoE, MoEConfig, ops
from flexpert.core.errors import FlexpertError
from flexpert.testing import assert_close, naive_moe

ROOT = Path(__file__).parents[3]
DTYPES = [torch.float32, torch.bfloat16]
LAYERS = {
    "mlp": {"expert_bias": True},
    "glu": {"expert": "glu", "activation": "silu", "renormalize": True, "num_shared_experts": 1},
    "capacity": {"capacity_factor": 1.0, "batch_prioritized": True, "router": "cosine"},
    "adaptive": {"capacity_factor": 0.0, "top_k": 1},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_layer(dtype, options):
    """A layer and its input, after making sure that the native kernels will run."""
    rows = [
        row for row in ops.report(dtype=dtype) if row["live"] and row["operator"].startswith("grouped_mlp")
    ]
    assert {row["backend"] for row in rows} == {"native"}
    torch.manual_seed(0)
    config = {"model_dim": 24, "hidden_dim": 40, "num_experts": 6, "top_k": 2, **options}
    return MoE(MoEConfig(**config)).to(dtype), torch.randn(2, 19, 24, dtype=dtype, requires_grad=True)


def step(layer, call, x):
    """Output and gradients by name."""
    y, info = call(x, return_info=True)
    loss = y.float().square().mean() + sum(info.losses.values())
    names = ["x", *(name for name, _ in layer.named_parameters())]
    grads = torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
    return {"y": y, **{name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}}


def assert_same_step(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert_close(got[name], value, tolerance, scale=1e-4, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_is_the_eager_one(preferred, name, dtype):
    layer, x = make_layer(dtype, LAYERS[name])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_same_step(step(layer, compiled, x), step(layer, layer, x), tolerance)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # what inductor imports
@pytest.mark.parametrize("dtype", DTYPES)
def test_inductor(preferred, dtype):
    layer, x = make_layer(dtype, LAYERS["glu"])
    compiled = torch.compile(layer, fullgraph=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same_step(step(layer, compiled, x), step(layer, layer, x), tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_recomputed_layer_has_the_same_bits(preferred, name, dtype):
    layer, x = make_layer(dtype, LAYERS[name])
    got = step(layer, lambda x, **options: checkpoint(layer, x, use_reentrant=False, **options), x)
    assert_same_step(got, step(layer, layer, x), 0.0)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_that_of_the_loops(preferred, name):
    layer, x = make_layer(torch.float32, LAYERS[name])
    got = step(layer, layer, x)
    wide, x = layer.double(), x.detach().double().requires_grad_()
    want = step(wide, wide, x)
    assert_close(got["y"], naive_moe(wide, x).output, 3e-6)
    for key, value in want.items():
        assert_close(got[key], value, 1e-5, scale=1e-4, name=key)


def test_autocast(preferred):
    """Routing stays in fp32; the experts run in bf16."""
    layer, x = make_layer(torch.float32, LAYERS["glu"])
    with torch.autocast("cpu", torch.bfloat16):
        got = step(layer, layer, x)
    want = step(layer, layer, x)
    for key, value in want.items():
        assert got[key].dtype == value.dtype
        assert_close(got[key], value, 3e-2, scale=1e-4, name=key)


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(live, make_case, gated, dtype):
    case = make_case(counts=(4, 0, 7), slots=(1, 0, -1), spare=2, gated=gated, dtype=dtype)
    operators = torch.ops.flexpert
    torch.library.opcheck(operators.grouped_mlp, (*case.args, True))
    frozen = [value.detach() if torch.is_tensor(value) else value for value in case.args]
    with torch.no_grad():
        torch.library.opcheck(operators.grouped_mlp, (*frozen, False))
        y, pre = operators.grouped_mlp(*frozen, True)
        x, unit, weight, counts, slot, w1, _, w2, b2, activation = frozen
        for needs in ([True] * 6, [False, True] * 3):
            args = torch.randn_like(y), pre, x, unit, weight, counts, slot, w1, w2, b2, activation, needs
            torch.library.opcheck(operators.grouped_mlp_backward, args)


def test_second_derivatives_are_refused(live, make_case):
    case = make_case(dtype=torch.float32)
    leaves = list(case.leaves.values())
    first = torch.autograd.grad(ops.grouped_mlp(*case.args).square().sum(), leaves, create_graph=True)
    with pytest.raises(FlexpertError, match="flexpert::grouped_mlp cannot be differentiated twice"):
        torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)


def test_no_gradient_without_what_backward_needs(live, make_case):
    with pytest.raises(FlexpertError, match="needs save=True"):
        torch.ops.flexpert.grouped_mlp(*make_case(dtype=torch.float32).args, False)


def test_a_layer_trains_where_the_compiler_is_hidden(tmp_path):
    """In a process that finds no compiler and no library: one line says so, and PyTorch's operators run."""
    script = """
import torch
from flexpert import MoE, MoEConfig
layer, x = MoE(MoEConfig(model_dim=8, hidden_dim=16, num_experts=4, top_k=2)), torch.randn(5, 8)
for _ in range(2):
    layer(x).sum().backward()
print(all(parameter.grad.isfinite().all() for parameter in layer.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CXX": str(tmp_path / "no compiler").replace(" ", "-"),
             "FLEXPERT_CACHE": str(tmp_path), "FLEXPERT_NATIVE": "auto"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"
    (line,) = done.stderr.splitlines()
    assert "no C++ compiler" in line
