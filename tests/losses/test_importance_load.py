"""Importance and load against the formulas of V-MoE, and the published mixed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flexpert import InputError, MoE, MoEConfig, RoutingContext
from flexpert.testing import assert_close

D, E = 6, 5


def make_layer(top_k=2, mixed=False, **noise):
    torch.manual_seed(0)
    losses = [{"name": "importance_load", "mixed": mixed}]
    router = {"name": "linear", **(noise or {"gate_noise": 1.0})}
    return MoE(
        MoEConfig(model_dim=D, hidden_dim=4, num_experts=E, top_k=top_k, router=router, losses=losses)
    ).double()


def cv_squared(values: Tensor) -> Tensor:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return variance / (mean**2 + 1e-10)


def normal_cdf(value: Tensor) -> Tensor:
    return (1 + torch.erf(value / math.sqrt(2))) / 2


def naive(clean_TE, noisy_TE, std_TE, top_k, mask, mixed=False):
    importance = [clean_TE.new_zeros(()) for _ in range(E)]
    load = [clean_TE.new_zeros(()) for _ in range(E)]
    for t in range(len(clean_TE)):
        if mask is not None and not mask[t]:
            continue
        probs = clean_TE[t].exp() / clean_TE[t].exp().sum()
        order = sorted(range(E), key=lambda e, t=t: -float(noisy_TE[t, e].detach()))
        threshold = noisy_TE[t, order[top_k - 1]]
        for e in range(E):
            importance[e] = importance[e] + probs[e]
            value = probs[e] if mixed else clean_TE[t, e]
            load[e] = load[e] + normal_cdf((value - threshold) / std_TE[t, e])
    return (cv_squared(importance) + cv_squared(load)) / 2


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("noise", [{"gate_noise": 1.0}, {"learned_noise": True}])
def test_value_and_gradient(noise, top_k, masked, mixed):
    layer = make_layer(top_k, mixed, **noise)
    x = torch.randn(30, D, dtype=torch.float64)
    mask = torch.rand(30) > 0.3 if masked else None
    context = RoutingContext(mask=mask, step=5)
    _, info = layer(x, context=context, return_info=True)
    clean = x @ layer.router.weight.T
    if "learned_noise" in noise:
        std = (1 + (x @ layer.router.noise_weight.T).exp()).log()
    else:
        std = torch.full_like(clean, 1.0 / E)
    noisy = info.routing.logits_TE
    # The noise that was drawn, as a constant: what the loss is differentiated around.
    drawn = ((noisy - info.routing.aux["clean_logits_TE"]) / info.routing.aux["noise_std"]).detach()
    want = naive(clean, clean + std * drawn, std, top_k, mask, mixed)
    value = info.losses["importance_load"]
    assert_close(value, want, 1e-9)
    leaves = list(layer.router.parameters())
    got = torch.autograd.grad(value, leaves)
    for a, b in zip(got, torch.autograd.grad(want, leaves), strict=True):
        assert_close(a, b, 1e-8, scale=1e-3)


def test_the_two_forms_differ():
    """The released form compares probabilities with logits; a scale test tells them apart."""
    x = torch.randn(30, D, dtype=torch.float64)
    values = {}
    for mixed in (False, True):
        layer = make_layer(2, mixed)
        _, info = layer(x, context=RoutingContext(step=5), return_info=True)
        values[mixed] = info.losses["importance_load"].item()
    assert abs(values[True] - values[False]) > 0.01


def test_zero_at_balance_and_large_at_collapse():
    layer = make_layer(1)
    x = torch.ones(50, D, dtype=torch.float64)
    torch.nn.init.zeros_(layer.router.weight)
    balanced = layer.eval()(x, return_info=True)[1].losses["importance_load"]
    assert 0 <= balanced < 1e-12
    torch.nn.init.ones_(layer.router.weight[3:4])
    collapsed = layer(x, return_info=True)[1].losses["importance_load"]
    assert abs(collapsed.item() - E) < 0.1  # CV^2 of a single one among E, with E - 1 degrees of freedom


def test_no_tokens_and_one_expert():
    layer = make_layer(2)
    hidden = RoutingContext(mask=torch.zeros(3, dtype=torch.bool))
    for x, context in ((torch.zeros(0, D), None), (torch.randn(3, D), hidden)):
        value = layer(x.double(), context=context, return_info=True)[1].losses["importance_load"]
        assert value == 0
        value.backward()
    assert layer.router.weight.grad.count_nonzero() == 0
    router = {"name": "linear", "gate_noise": 1.0}
    lone = MoE(MoEConfig(model_dim=D, hidden_dim=4, num_experts=1, router=router, losses=["importance_load"]))
    value = lone(torch.randn(3, D), return_info=True)[1].losses["importance_load"]
    assert value == 0
    value.backward()
    assert lone.router.weight.grad.isfinite().all()


@pytest.mark.parametrize("router", ["linear", "expert_choice"])
def test_needs_noise(router):
    config = MoEConfig(model_dim=D, hidden_dim=4, num_experts=E, router=router, losses=["importance_load"])
    with pytest.raises(InputError, match="needs a router with gate_noise > 0 or learned_noise=True"):
        MoE(config)(torch.randn(3, D), return_info=True)


def test_minimised_it_balances():
    layer = make_layer(1).float()
    torch.nn.init.normal_(layer.router.weight[0], mean=0.5)
    x = torch.randn(400, D) + 0.5
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.03)
    violations = []
    for step in range(60):
        _, info = layer(x, context=RoutingContext(step=step), return_info=True)
        violations.append(float(info.stats.max_violation))
        optimizer.zero_grad()
        info.losses["importance_load"].backward()
        optimizer.step()
    assert violations[0] > 1
    assert violations[-1] < 0.5
