"""Expert choice against its definition: every expert takes its best tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert import CapacityRouting, ConfigError, InputError, MoE, MoEConfig, RoutingContext
from flexpert.testing import assert_close

D, F = 5, 7


def make_layer(seed=0, num_experts=4, **options):
    torch.manual_seed(seed)
    spec = {"name": "expert_choice", **options.pop("router", {})}
    config = MoEConfig(model_dim=D, hidden_dim=F, num_experts=num_experts, router=spec, **options)
    return MoE(config).double()


def naive(layer, x, context, top_k, factor):
    """(output, rows of each expert): plain loops."""
    num_experts = layer.experts.num_experts
    real = [context.mask is None or bool(context.mask[t]) for t in range(len(x))]
    allowed = context.expert_mask
    logits = x @ layer.router.weight.T
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    scores = logits.softmax(-1) if layer.router.scoring == "softmax" else logits.sigmoid()
    y = [x.new_zeros(layer.experts.output_dim) for _ in x]
    rows = [[] for _ in range(num_experts)]
    size = len(x) // context.num_groups
    for group in range(context.num_groups):
        members = [t for t in range(group * size, (group + 1) * size) if real[t]]
        limit = top_k * max(1, int(factor * math.ceil(len(members) / num_experts)))
        for e in range(num_experts):
            mine = [t for t in members if logits[t, e] > -math.inf]
            rows[e] += sorted(mine, key=lambda t, e=e: -float(scores[t, e].detach()))[:limit]
    for e in range(num_experts):
        for t in rows[e]:
            hidden = torch.nn.functional.gelu(layer.experts.w1[e] @ x[t])
            y[t] = y[t] + scores[t, e] * (layer.experts.w2[e] @ hidden)
    return (torch.stack(y) if y else x.new_zeros(0, D)), rows


def check(layer, x, context, top_k, factor):
    y, info = layer(x, context=context, return_info=True)
    want, rows = naive(layer, x, context, top_k, factor)
    assert_close(y, want)
    routing = info.routing
    counts = [len(r) for r in rows]
    assert routing.counts_E.tolist() == counts
    got = routing.unit_N[: sum(counts)].split(counts)
    assert [part.tolist() for part in got] == rows
    assert routing.weight_N[sum(counts) :].count_nonzero() == 0
    assert isinstance(routing, CapacityRouting)
    assert (routing.counts_E <= routing.capacity_E).all()
    places = set(zip(routing.expert_N()[: sum(counts)].tolist(), routing.slot_N.tolist(), strict=False))
    assert len(places) == sum(counts)
    assert all(slot < routing.buffer_capacity for _, slot in places)
    if y.requires_grad and len(x):
        grad = torch.randn_like(y)
        leaves = [x, *layer.parameters()]
        want = want + 0 * y  # an independent result without any row has no gradient of its own: zeros
        for a, b in zip(
            torch.autograd.grad(y, leaves, grad, retain_graph=True),
            torch.autograd.grad(want, leaves, grad),
            strict=True,
        ):
            assert_close(a, b, scale=1e-3)


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 24),
    num_experts=st.integers(1, 6),
    factor=st.sampled_from([None, 0.3, 1.0, 2.0, 9.0]),
    masked=st.booleans(),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_every_expert_takes_its_best_tokens(tokens, num_experts, factor, masked, scoring, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3) if tokens % g == 0]))
    scoring = scoring if num_experts > 1 else "sigmoid"  # the softmax over one expert is 1: all would tie
    options = {"num_experts": num_experts, "top_k": top_k, "capacity_factor": factor}
    layer = make_layer(seed, router={"scoring": scoring}, **options)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(tokens) > 0.4 if masked else None
    check(layer, x, RoutingContext(mask=mask, num_groups=groups), top_k, 1.0 if factor is None else factor)


def test_loads_are_equal_and_nothing_is_dropped():
    layer = make_layer(top_k=2, capacity_factor=1.0)
    _, info = layer(torch.randn(40, D).double(), return_info=True)
    assert info.routing.counts_E.tolist() == [20] * 4
    assert info.stats.dropped == 0
    assert info.stats.max_violation == 0
    assert_close(info.losses["balance"], torch.tensor(1.0, dtype=torch.float64))


def test_overrides_of_one_call():
    # A softmax over a single expert that is left is 1: such tokens would tie.
    layer = make_layer(router={"scoring": "sigmoid"})
    x = torch.randn(12, D, dtype=torch.float64, requires_grad=True)
    check(layer, x, RoutingContext(top_k=3), 3, 1.0)
    check(layer, x, RoutingContext(capacity_factor=2.0), 1, 2.0)
    check(layer, x, RoutingContext(capacity_factor=None), 1, 1.0)
    check(layer, x, RoutingContext(expert_mask=torch.tensor([True, False, True, True])), 1, 1.0)
    allowed = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    allowed[1] = False
    check(layer, x, RoutingContext(expert_mask=allowed, mask=torch.arange(12) != 5), 1, 1.0)
    check(layer, x, RoutingContext(), 1, 1.0)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"ranks": (0, 1)}, r"ranks=\(0, 1\): expert choice has no use for it"),
        ({"top_k": 0}, "top_k=0: expected an integer"),
        ({"top_k": 5}, "top_k=5: expected an integer, 1 <= top_k <= num_experts=4"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0: expert choice fills its experts"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0: .*expected a number > 0, or None for 1"),
        ({"capacity_factor": float("inf")}, "capacity_factor=inf"),
        ({"expert_mask": torch.ones(3, dtype=torch.bool)}, r"expert_mask has shape \(3,\)"),
    ],
)
def test_overrides_that_do_not_fit(facts, message):
    with pytest.raises(InputError, match=message):
        make_layer()(torch.randn(6, D).double(), context=RoutingContext(**facts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0: expert choice fills its experts"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"router": {"score": "hash"}}, "unknown score 'hash': valid: cosine, linear"),
        ({"router": {"scoring": "softmx"}}, "unknown scoring 'softmx'"),
        ({"router": {"gate_noise": 1.0}}, "router 'expert_choice': unknown option 'gate_noise'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_layer(**options)


@pytest.mark.parametrize("name", ["batch_prioritized", "renormalize"])
def test_settings_of_token_choice_are_refused(name):
    config = MoEConfig(model_dim=4, hidden_dim=4, num_experts=2, router="expert_choice", **{name: True})
    with pytest.raises(ConfigError, match=f"{name}=True: router 'expert_choice' has no use for it"):
        config.build()
