"""Soft MoE against its formulas, written slot by slot and token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert import ConfigError, DenseRouting, InputError, MoE, MoEConfig, RoutingContext
from flexpert.testing import assert_close

D, F, E = 4, 5, 3


def make_layer(seed=0, slots=2, normalize=True, **options):
    torch.manual_seed(seed)
    router = {"name": "soft", "slots_per_expert": slots, "normalize": normalize}
    config = {"model_dim": D, "hidden_dim": F, "num_experts": E, "router": router, **options}
    layer = MoE(MoEConfig(**config)).double()
    if normalize:
        torch.nn.init.constant_(layer.router.scale, 1.7)
    return layer


def expert(layer, e, x_D):
    return layer.experts.w2[e] @ torch.nn.functional.gelu(layer.experts.w1[e] @ x_D)


def naive(layer, x_SD, real):
    """One sequence: output and the share of each expert in each token."""
    phi = layer.router.weight
    if layer.router.normalize:
        logits = [
            [layer.router.scale * (x / x.norm()) @ (p / p.norm()) if ok else None for p in phi]
            for x, ok in zip(x_SD, real, strict=True)
        ]
    else:
        logits = [[x @ p if ok else None for p in phi] for x, ok in zip(x_SD, real, strict=True)]
    mine = [s for s, ok in enumerate(real) if ok]
    slots = len(phi) // layer.experts.num_experts
    results = []
    for p in range(len(phi)):
        powers = {s: logits[s][p].exp() for s in mine}
        mixed = sum(powers[s] / sum(powers.values()) * x_SD[s] for s in mine) if mine else x_SD.new_zeros(D)
        results.append(expert(layer, p // slots, mixed))
    y = []
    for s in range(len(x_SD)):
        if not real[s]:
            y.append(x_SD.new_zeros(layer.experts.output_dim))
            continue
        powers = torch.stack([z.exp() for z in logits[s]])
        y.append(sum(w * r for w, r in zip(powers / powers.sum(), results, strict=True)))
    return torch.stack(y)


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    slots=st.integers(1, 3),
    normalize=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_soft_is_its_formula(batch, length, slots, normalize, masked, seed):
    layer = make_layer(seed, slots, normalize)
    x = torch.randn(batch, length, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(batch, length) > 0.3 if masked else torch.ones(batch, length, dtype=torch.bool)
    y, info = layer(x, context=RoutingContext(mask=mask if masked else None), return_info=True)
    want = torch.stack([naive(layer, x[b], mask[b].tolist()) for b in range(batch)])
    assert_close(y, want)
    assert isinstance(info.routing, DenseRouting)
    assert info.routing.counts_E.tolist() == [batch * slots] * E
    if not mask.any():
        return
    leaves, grad = [x, *layer.parameters()], torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, leaves, grad, allow_unused=True),
        torch.autograd.grad(want, leaves, grad, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert_close(torch.zeros_like(b) if a is None else a, b, scale=1e-3)


def test_shares_sum_to_one():
    layer, x = make_layer(), torch.randn(2, 5, D, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    _, info = layer(x, context=RoutingContext(mask=mask), return_info=True)
    routing = info.routing
    assert_close(routing.dispatch_BSP.sum(1), torch.ones(2, 2 * E, dtype=torch.float64))
    assert_close(routing.combine_BSP.sum(2), mask.double())
    assert routing.dispatch_BSP[~mask].count_nonzero() == 0
    assert_close(routing.probs_TE.sum(1), mask.flatten().double())


@pytest.mark.parametrize("shape", [(0, D), (0, 5, D), (2, 0, D), (3, 0, 5, D)])
def test_no_tokens(shape):
    layer = make_layer()
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y, info = layer(x, return_info=True)
    assert y.shape == x.shape
    assert info.losses["balance"] == 0
    (y.sum() + info.losses["balance"]).backward()
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in layer.parameters())


def test_sequences_are_apart():
    layer, x = make_layer(), torch.randn(3, 4, D, dtype=torch.float64)
    y = layer(x)
    assert_close(y, torch.stack([layer(x[i]) for i in range(3)]))
    assert_close(layer(x.flatten(0, 1), context=RoutingContext(sequence_length=4)), y.flatten(0, 1))
    assert_close(layer(x.flatten(0, 1), context=RoutingContext(num_groups=3)), y.flatten(0, 1))


def test_a_sequence_that_is_cut_is_refused():
    with pytest.raises(InputError, match="sequence_length=4 does not divide the 6 tokens of a token group"):
        make_layer()(torch.randn(3, 4, D).double(), context=RoutingContext(num_groups=2))
    with pytest.raises(InputError, match="sequence_length=5 does not divide the 12 tokens"):
        make_layer()(torch.randn(12, D).double(), context=RoutingContext(sequence_length=5))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"top_k": 2}, "top_k=2: soft routing has no use for it; leave it out"),
        ({"capacity_factor": 1.0}, "capacity_factor=1.0: soft routing"),
        ({"ranks": (1,)}, r"ranks=\(1,\): soft routing"),
        ({"expert_mask": torch.ones(E, dtype=torch.bool)}, r"expert_mask=\(3,\): soft routing"),
    ],
)
def test_overrides_of_choices_are_refused(facts, message):
    with pytest.raises(InputError, match=message):
        make_layer()(torch.randn(6, D).double(), context=RoutingContext(**facts))


def test_dropless_is_what_soft_routing_is():
    x = torch.randn(6, D).double()
    assert torch.equal(make_layer()(x, capacity_factor=None), make_layer()(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": {"name": "soft", "slots_per_expert": 0}}, "slots_per_expert=0: expected an integer >= 1"),
        ({"router": {"name": "soft", "normalize": 1}}, "normalize=1: expected True or False"),
        (
            {"router": {"name": "soft", "slots": 2}},
            "router 'soft': unknown option 'slots'; valid: normalize, slots_per_expert",
        ),
        ({"capacity_factor": 1.0}, "capacity_factor=1.0: router 'soft' has no use for it"),
        ({"batch_prioritized": True}, "batch_prioritized=True: router 'soft' has no use for it"),
        ({"renormalize": True}, "renormalize=True: router 'soft' has no use for it"),
        ({"combine": "weighted_input"}, "WeightedInput weighs choices, and SoftRouter makes none"),
        ({"combine": "one_plus"}, "OnePlus weighs choices"),
        ({"combine": {"name": "scaled", "hard": True}}, "Scaled weighs choices"),
    ],
)
def test_bad_options(options, message):
    config = MoEConfig(model_dim=D, hidden_dim=F, num_experts=E, **{"router": "soft", **options})
    with pytest.raises(ConfigError, match=message):
        config.build()


def test_scaled_is_fine():
    x = torch.randn(6, D).double()
    assert_close(make_layer(combine={"name": "scaled", "scale": 3.0})(x), 3 * make_layer()(x))
