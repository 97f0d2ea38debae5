"""Logits of many tokens in bf16 and their gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexpert import ops
from flexpert.core.errors import InputError
from flexpert.ops.cpu import build
from flexpert.ops.cpu import route as native_route

pytestmark = [pytest.mark.usefixtures("live", "poisoned"), pytest.mark.each_cap]

ANY_SHAPE = settings(
    max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FEW = native_route.FEW_TOKENS
HALF = 2**-8  # of a number in bf16: its rounding error is below


def make(tokens, size, experts, seed=0):
    """Tokens and weights in bf16, and a gradient of the logits in fp32 with numbers of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, size), (experts, size), (tokens, experts)
    x, w, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.bfloat16(), w.bfloat16(), grad * torch.logspace(-3, 0, tokens)[:, None]


def differentiate(x, w, grad):
    """Gradients of (x, w)."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    ops.router_logits(x, w).backward(grad)
    return x.grad, w.grad


@ANY_SHAPE
@given(
    tokens=st.sampled_from([FEW + 1, FEW + 2, 96, 97, 1024, 1025, 2100]),
    size=st.sampled_from([1, 15, 32, 33, 130, 255]),
    experts=st.sampled_from([1, 3, 8, 16, 17, 33, 64, 65]),
)
def test_values_and_gradients(tokens, size, experts):
    x, w, grad = make(tokens, size, experts)
    wide_x, wide_w, wide_grad = x.double(), w.double(), grad.double()
    terms = wide_x.abs() @ wide_w.abs().T
    assert ((ops.router_logits(x, w).double() - wide_x @ wide_w.T).abs() <= 1e-6 * terms).all()
    wants = (
        (wide_grad @ wide_w, wide_grad.abs() @ wide_w.abs()),
        (wide_grad.T @ wide_x, wide_grad.abs().T @ wide_x.abs()),
    )
    for got, (want, terms) in zip(differentiate(x, w, grad), wants, strict=True):
        assert got.dtype == torch.bfloat16
        assert ((got.double() - want).abs() <= HALF * want.abs() + 1e-5 * terms).all()


@pytest.fixture
def multiplies(live):
    """Only where these kernels run: PyTorch's products make no promises."""
    if build.native().instructions(torch.bfloat16) == "AVX2":
        pytest.skip("with AVX2 PyTorch computes logits of many tokens")


@pytest.mark.usefixtures("multiplies")
def test_same_bits_for_any_number_of_threads(threads):
    x, w, grad = make(1300, 200, 40)
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append((ops.router_logits(x, w), *differentiate(x, w, grad)))
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_strides_and_what_is_not_asked_for():
    x, w, grad = make(100, 40, 5)
    across = [tensor.T.contiguous().T for tensor in (x, w, grad)]
    assert torch.equal(ops.router_logits(*across[:2]), ops.router_logits(x, w))
    backward = torch.ops.flexpert.router_logits_backward
    d_x, d_w = backward(grad, x, w, [True, True])
    only_x = backward(across[2], *across[:2], [True, False])
    only_w = backward(grad, x, w, [False, True])
    assert torch.equal(only_x[0], d_x)
    assert only_x[1].numel() == 0
    assert torch.equal(only_w[1], d_w)
    assert only_w[0].numel() == 0


def test_kernels_are_called_where_the_processor_multiplies_bf16(monkeypatch):
    called = []
    monkeypatch.setattr(native_route, "run", lambda name, *args, **kwargs: called.append(name))
    x, w, grad = make(FEW + 1, 8, 4)
    ops.router_logits(x, w)
    torch.ops.flexpert.router_logits_backward(grad, x, w, [True, True])
    multiplies = build.native().instructions(torch.bfloat16) != "AVX2"
    assert called == (["score_bf16", "score_backward_bf16"] if multiplies else [])


@pytest.mark.usefixtures("multiplies")
def test_what_does_not_fit_is_refused():
    x, w, grad = make(FEW + 1, 8, 4)
    with pytest.raises(InputError, match=r"w_ED is torch.bfloat16 \(4, 7\), not torch.bfloat16 \(4, 8\)"):
        torch.ops.flexpert.router_logits(x, w[:, :7])
    with pytest.raises(InputError, match="grad_TE is torch.float64"):
        native_route.router_logits_backward(grad.double(), x, w, [True, True])
