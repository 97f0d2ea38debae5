"""Combine objects against their formulas."""

from __future__ import annotations

import pytest
import torch

from flexpert import ConfigError, InputError, MoE, MoEConfig, Routing
from flexpert.combine import COMBINES, OnePlus, Scaled, WeightedInput, WeightedSum
from flexpert.testing import assert_close

D, E, K = 4, 3, 2


def make_layer(combine, **options):
    torch.manual_seed(0)
    defaults = {"model_dim": D, "hidden_dim": 6, "num_experts": E, "top_k": K, "expert_bias": True}
    layer = MoE(MoEConfig(**{**defaults, "combine": combine, **options})).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def formula(layer, x, term, *, logits=False):
    """The sum over a token's experts of term(weight or logit, expert)."""

    def expert(e):
        bank = layer.experts

        def call(x_D):
            hidden = torch.nn.functional.gelu(bank.w1[e] @ x_D + bank.b1[e])
            return bank.w2[e] @ hidden + bank.b2[e]

        return call

    y = []
    for x_D in x:
        scores = layer.router.weight @ x_D
        scores = scores if logits else scores.softmax(0)
        chosen = scores.topk(K).indices.tolist()
        y.append(sum(term(scores[e], expert(e), x_D) for e in chosen))
    return torch.stack(y)


TERMS = {
    "sum": lambda w, f, x: w * f(x),
    "weighted_input": lambda w, f, x: f(w * x),
    "one_plus": lambda w, f, x: (1 + w) * f(x),
    "scaled": lambda w, f, x: w * f(x),
    "scaled by 3": lambda w, f, x: 3 * w * f(x),
    "one_plus logits": lambda w, f, x: (1 + w) * f(x),
    "hard": lambda w, f, x: f(x),
    "hard by 1.5": lambda w, f, x: 1.5 * f(x),
}
SPECS = {
    "one_plus logits": {"name": "one_plus", "logits": True},
    "scaled by 3": {"name": "scaled", "scale": 3.0},
    "hard": {"name": "scaled", "hard": True},
    "hard by 1.5": {"name": "scaled", "hard": True, "scale": 1.5},
}


@pytest.mark.parametrize("name", TERMS)
def test_formula(name):
    layer = make_layer(SPECS.get(name, name))
    x = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    y, want = layer(x), formula(layer, x, TERMS[name], logits=name.endswith("logits"))
    assert_close(y, want)
    leaves, grad = [x, *layer.parameters()], torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True)
    true = torch.autograd.grad(want, leaves, grad, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, true, strict=True):
        assert_close(a, b, scale=1e-3)
    if name.startswith("hard"):
        assert got[1].count_nonzero() == 0  # the gate


@pytest.mark.parametrize("name", [*COMBINES, "one_plus logits"])
def test_dropped_tokens_get_nothing(name):
    layer = make_layer(SPECS.get(name, name), capacity_factor=0.3, top_k=1)
    y, info = layer(torch.randn(20, D).double(), return_info=True)
    kept = info.routing.unit_N[: int(info.routing.counts_E.sum())]
    dropped = [t for t in range(20) if t not in kept.tolist()]
    assert len(dropped) == info.stats.dropped > 0
    assert y[dropped].count_nonzero() == 0


def test_logits_of_a_router_of_zeros_add_nothing():
    layer = make_layer({"name": "one_plus", "logits": True}, top_k=E)
    torch.nn.init.zeros_(layer.router.weight)
    x = torch.randn(5, D, dtype=torch.float64)
    assert_close(layer(x), formula_of_all(layer, x))


def formula_of_all(layer, x):
    """The plain sum of all experts."""
    bank = layer.experts
    hidden = torch.nn.functional.gelu(torch.einsum("efd,td->tef", bank.w1, x) + bank.b1)
    return (torch.einsum("edf,tef->ted", bank.w2, hidden) + bank.b2).sum(1)


def test_logits_are_asked_of_a_router_that_has_them():
    routing = Routing(
        unit_N=torch.arange(2), weight_N=torch.ones(2), counts_E=torch.tensor([1, 1]), num_units=2
    )
    with pytest.raises(InputError, match="logits=True, and the router has no logits; use a linear one"):
        OnePlus(logits=True)(torch.ones(2, D), routing, torch.float32)


def test_what_can_be_fused_and_what_needs_a_selection():
    for combine, plain, needs in (
        (WeightedSum(), True, False),
        (WeightedInput(), False, True),
        (OnePlus(), False, True),
        (Scaled(scale=2.0), False, False),
        (Scaled(hard=True), False, True),
    ):
        assert (combine.plain, combine.needs_selection) == (plain, needs)


@pytest.mark.parametrize(
    ("combine", "message"),
    [
        ("sums", "unknown combine 'sums': did you mean 'sum'. valid: one_plus, scaled, sum, weighted_input"),
        ({"name": "sum", "scale": 1.0}, "combine 'sum': unknown option 'scale'; valid: none"),
        ({"name": "scaled", "scale": float("nan")}, "scale=nan: expected a finite number"),
        ({"name": "one_plus", "logits": 1}, "logits=1: expected True or False"),
        ({"name": "scaled", "hard": "yes"}, "hard='yes': expected True or False"),
    ],
)
def test_bad_configs(combine, message):
    with pytest.raises(ConfigError, match=message):
        make_layer(combine)
