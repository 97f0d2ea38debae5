"""All that is compared computes the same: outputs and gradients against the naive loops."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flexpert import ops
from flexpert.bench.implementations import LARGEST_DISPATCH, OURS, PLAIN, REFERENCES, UnavailableError, fused
from flexpert.bench.peers import PEERS
from flexpert.ops import packing
from flexpert.testing import assert_close

LAYERS = {item.name: item for item in (*OURS, *PLAIN, *PEERS)}
PACKED = ["flexpert prepacked", "flexpert prepacked layer"]
INSTALLED = [name for name in LAYERS if name not in {"fairscale", "vllm", "flexpert rows", *PACKED}]


def run(problem, item):
    for leaf in problem.leaves:
        leaf.grad = None
    with item.context():
        out = item.build(problem)()
        out.backward(problem.grad_TD)
    return out, [leaf.grad for leaf in problem.leaves]


def naive(problem):
    for leaf in problem.leaves:
        leaf.grad = None
    with ops.use_backend("reference"):
        out = fused(problem)()
        out.backward(problem.grad_TD)
    return out, [leaf.grad for leaf in problem.leaves]


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", INSTALLED)
def test_layers_agree_with_the_naive_loops(make, name, gated, capacity_factor):
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    problem = make(gated=gated, capacity_factor=capacity_factor, activation="silu")
    if (name == "einsum" and capacity_factor is None) or (name == "transformers eager" and not gated):
        with pytest.raises(UnavailableError, match="this configuration"):
            LAYERS[name].build(problem)
        return
    want, want_grads = naive(problem)
    out, grads = run(problem, LAYERS[name])
    assert_close(out, want, 1e-5)
    for grad, want_grad in zip(grads[-2:], want_grads[-2:], strict=True):
        assert_close(grad, want_grad, 1e-5)
    if name != "flexpert layer":  # its router computes the weights, so x and router have more gradient
        assert_close(grads[0], want_grads[0], 1e-5)
        assert_close(grads[2], want_grads[2], 1e-5)


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("name", PACKED)
def test_packed_layers_agree_with_the_naive_loops(make, monkeypatch, name, capacity_factor):
    with pytest.raises(UnavailableError, match="no packed form"):
        LAYERS[name].build(make())
    monkeypatch.setattr(packing, "why_not", lambda device, dtype: None)  # portable kernels take them anywhere
    problem = make(gated=True, capacity_factor=capacity_factor, activation="silu", dtype=torch.bfloat16)
    with torch.no_grad(), ops.use_backend("portable"):
        out = LAYERS[name].build(problem)()
    with torch.no_grad(), ops.use_backend("reference"):
        assert_close(out, fused(problem)(), 3 * torch.finfo(torch.bfloat16).eps)


def test_the_dense_products_have_the_work_of_the_layer(make):
    problem = make(gated=True)
    (dense,) = (item for item in REFERENCES if item.name == "dense")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense.build(problem)()
    assert counter.get_total_flops() == problem.flops
    with FlopCounterMode(display=False) as counter:
        out = dense.build(problem)()
    assert counter.get_total_flops() == 3 * problem.flops
    assert not out.requires_grad


def test_the_stream_reads_the_bytes_of_touched_weights(make, monkeypatch):
    sizes = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size: sizes.append(size) or randn(*size))
    problem = make(tokens=1, model_dim=64, hidden_dim=64)
    (stream,) = (item for item in REFERENCES if item.name == "stream")
    assert stream.build(problem)().isfinite().all()
    rows, width = sizes[0]
    assert problem.touched_bytes <= 4 * rows * width < problem.touched_bytes + 4 * width


def test_a_dispatch_tensor_too_large_is_not_made(make):
    problem = make(tokens=2**15, num_experts=4, capacity_factor=1.0, model_dim=1, hidden_dim=1)
    assert 2**15 * 4 * problem.shape.capacity > LARGEST_DISPATCH
    with pytest.raises(UnavailableError, match="too large"):
        LAYERS["einsum"].build(problem)
