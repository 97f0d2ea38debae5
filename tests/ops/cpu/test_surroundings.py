"""What a program sets for all of PyTorch, a default dtype or device, does not reach the kernels."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from flexpert import ops
from tests.ops.cpu.test_layer import LAYERS, make_layer, step

DTYPES = [torch.float32, torch.bfloat16]


@contextmanager
def defaults_of(name):
    """New tensors are of that dtype, or on that device, where nobody says otherwise."""
    before = torch.get_default_dtype()
    if name == "meta":
        with torch.device(name):
            yield
        return
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def surroundings(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_routing(live, surroundings, tokens, dtype):
    x, w = torch.randn(tokens, 24, dtype=dtype), torch.randn(6, 24, dtype=dtype)

    def call():
        logits = ops.router_logits(x, w)
        leaf = logits.detach().requires_grad_()
        routes = ops.route(leaf, 2, normalize=True, limit=9)
        return [logits, *routes, *torch.autograd.grad(routes.weight_N.sum(), leaf)]

    want = call()
    with defaults_of(surroundings):
        got = call()
    for mine, true in zip(got, want, strict=True):
        assert mine.dtype == true.dtype
        assert torch.equal(mine, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(preferred, surroundings, name, dtype):
    layer, x = make_layer(dtype, LAYERS[name])
    want = step(layer, layer, x)
    with torch.no_grad():
        alone = layer(x)
    with defaults_of(surroundings):
        got = step(layer, layer, x)
        with torch.no_grad():
            assert torch.equal(layer(x), alone)
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key
