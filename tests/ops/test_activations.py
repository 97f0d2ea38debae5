"""Named activations: the fused derivatives are those of autograd, and names are checked."""

from __future__ import annotations

import pytest
import torch

from flexpert.core.errors import ConfigError
from flexpert.ops import ACTIVATIONS, get_activation

FORMULAS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "identity": lambda x: x * 1,
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
}


def test_every_activation_has_a_formula_here() -> None:
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_forward_and_derivative(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, dtype=torch.float64, generator=generator).mul_(2).requires_grad_()
    grad = torch.randn(64, dtype=torch.float64, generator=generator)
    before = x.detach().clone()
    want = FORMULAS[name](x)
    act = get_activation(name)
    torch.testing.assert_close(act.forward(x.detach()), want.detach(), rtol=1e-12, atol=1e-12)
    (d_x,) = torch.autograd.grad(want, x, grad)
    kept = grad.clone()
    torch.testing.assert_close(act.backward(grad, x.detach()), d_x, rtol=1e-11, atol=1e-11)
    assert torch.equal(x.detach(), before)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_results_are_new_tensors(name: str) -> None:
    x, grad = torch.ones(3), torch.ones(3)
    act = get_activation(name)
    assert act.forward(x).data_ptr() != x.data_ptr()
    assert act.backward(grad, x).data_ptr() not in (x.data_ptr(), grad.data_ptr())


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_results_may_be_written_anywhere(name: str) -> None:
    """To rows that lie apart, from such rows, and over an input."""
    apart = torch.randn(5, 16)
    act, grad = get_activation(name), torch.randn(5, 8)
    for pre in (torch.randn(5, 8), apart[:, :8]):
        want, d_want = act.forward(pre.clone()), act.backward(grad, pre.clone())
        for out in (apart[:, 8:], torch.empty(5, 8)):
            for run, right in ((act.forward, (want, pre)), (act.backward, (d_want, grad, pre))):
                out.fill_(7)
                assert run(*right[1:], out=out) is out
                torch.testing.assert_close(out, right[0])
        second, first = grad.clone(), pre.clone()
        assert act.backward(second, pre, out=second) is second
        torch.testing.assert_close(second, d_want)
        torch.testing.assert_close(act.backward(grad, first, out=first), d_want)
        first.copy_(pre)
        torch.testing.assert_close(act.forward(first, out=first), want)


def test_unknown_name_lists_the_options() -> None:
    with pytest.raises(ConfigError, match="'swish' is unknown; choose one of: gelu, gelu_tanh, identity"):
        get_activation("swish")
