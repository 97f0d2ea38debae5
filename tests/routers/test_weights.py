"""Weight rules: values and gradients."""

from __future__ import annotations

import pytest
import torch

from flexpert import ConfigError, MoE, MoEConfig
from flexpert.routers.weights import WeightRule
from flexpert.testing import assert_close


def scores(tokens=6, top_k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("renormalize", [False, True, "always"])
def test_renormalize(renormalize, top_k, scale):
    score_TK = scores(top_k=top_k)
    weight_TK = WeightRule(renormalize=renormalize, scale=scale)(score_TK)
    if renormalize == "always" or (renormalize and top_k > 1):
        assert_close(weight_TK, scale * score_TK / score_TK.sum(1, keepdim=True))
    else:
        assert torch.equal(weight_TK, scale * score_TK)


def test_renormalised_weights_of_nobody_are_zero():
    score_TK = torch.zeros(2, 3, requires_grad=True)
    weight_TK = WeightRule(renormalize="always")(score_TK)
    assert weight_TK.count_nonzero() == 0
    weight_TK.sum().backward()
    assert score_TK.grad.isfinite().all()


def test_straight_through_is_one_with_the_relative_gradient():
    score_TK = scores()
    score_TK.data[1, 2] = 0.0  # an absent expert
    weight_TK = WeightRule(straight_through=True)(score_TK)
    want = torch.ones(6, 3, dtype=torch.float64)
    want[1, 2] = 0.0
    assert_close(weight_TK, want)
    grad = torch.randn(6, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(weight_TK, score_TK, grad)
    expected = grad / score_TK.detach()
    expected[1, 2] = 0.0
    assert_close(got, expected)


@pytest.mark.parametrize("renormalize", [False, True, "always"])
def test_a_single_expert_leaves_the_gate_its_gradient_unless_asked(renormalize):
    torch.manual_seed(0)
    layer = MoE(
        MoEConfig(model_dim=4, hidden_dim=6, num_experts=3, top_k=1, renormalize=renormalize)
    ).double()
    layer(torch.randn(8, 4, dtype=torch.float64)).square().sum().backward()
    norm = layer.router.weight.grad.norm()
    assert (norm > 1e-3) == (renormalize != "always")
    if renormalize == "always":
        assert norm < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renormalize": "sometimes"}, "renormalize='sometimes': expected False, True .*or 'always'"),
        ({"scale": float("inf")}, "scale=inf: expected a finite number"),
        ({"scale": "1"}, "scale='1': expected a finite number"),
        ({"straight_through": 1}, "straight_through=1: expected True or False"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ConfigError, match=message):
        WeightRule(**options)
