"""Token choice by one operator and step by step: the same routing, field by field, and the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from flexpert import ops
from flexpert.core.context import RoutingContext
from flexpert.routers import CosineRouter, LinearRouter, TokenChoiceRouter
from flexpert.testing import assert_close

D = 6


@pytest.fixture(autouse=True, scope="module")
def portable():
    """Native kernels round scores otherwise than PyTorch."""
    with ops.use_backend("portable"):
        yield


class InSteps:
    """A router whose calls never take the one operator."""

    def _is_plain(self, context):
        return False


class LinearInSteps(InSteps, LinearRouter):
    pass


class CosineInSteps(InSteps, CosineRouter):
    pass


KINDS = {"linear": (LinearRouter, LinearInSteps), "cosine": (CosineRouter, CosineInSteps)}


def make_pair(kind="linear", dtype=torch.float64, **options):
    plain, steps = (cls(model_dim=D, **options) for cls in KINDS[kind])
    steps.load_state_dict(plain.state_dict())
    if plain.selection_bias is not None:
        bias = torch.linspace(-0.3, 0.3, plain.num_experts)
        plain.selection_bias.copy_(bias)
        steps.selection_bias.copy_(bias)
    return plain.to(dtype), steps.to(dtype)


def make_tokens(tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(router, routing, x):
    generator = torch.Generator().manual_seed(2)
    outputs = [routing.weight_N, routing.probs_TE, routing.logits_TE, routing.aux["clean_logits_TE"]]
    outputs = [o for o in outputs if o.requires_grad]  # uniform scores have no gradient
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, [x, *router.parameters()], grads)


def assert_same_routing(got, want):
    """Bit by bit."""
    assert type(got) is type(want)
    (mine, tree), (true, other) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    assert tree == other
    for a, b in zip(mine, true, strict=True):
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b


@settings(max_examples=200)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    tokens=st.sampled_from([0, 1, 2, 7, 33]),
    shape=st.integers(1, 9).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
    scoring=st.sampled_from(sorted(ops.SCORINGS)),
    renormalize=st.sampled_from([False, True, "always"]),
    scale=st.sampled_from([1.0, 2.5]),
    capacity_factor=st.sampled_from([None, 0.0, 0.3, 1.0, -0.5, 1.25]),
    batch_prioritized=st.booleans(),
    selection_bias=st.booleans(),
    gate_noise=st.sampled_from([0.0, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_rules(kind, tokens, shape, dtype, **rules):
    experts, top_k = shape
    plain, steps = make_pair(kind, dtype, num_experts=experts, top_k=top_k, **rules)
    steps.seeds = plain.seeds
    x, context = make_tokens(tokens, dtype), RoutingContext(step=3)
    got, want = plain(x, context), steps(x, context)
    assert_same_routing(got, want)
    pairs = zip(gradients(plain, got, x), gradients(steps, want, x), strict=True)
    for mine, true in pairs:
        assert mine.dtype == true.dtype
        torch.testing.assert_close(mine, true)


@pytest.fixture
def taken(monkeypatch):
    """Whether the one operator has run."""
    calls = []
    inner = ops.route
    monkeypatch.setattr(ops, "route", lambda *args, **rules: calls.append(1) or inner(*args, **rules))
    return calls


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"selection": "top_p"}, {}),
        ({"selection": {"name": "group_limited", "groups": 2, "groups_kept": 1}}, {}),
        ({"straight_through": True}, {}),
        ({}, {"mask": torch.tensor([True] * 7 + [False])}),
        ({}, {"expert_mask": torch.tensor([True, True, False, True])}),
        ({}, {"ranks": (1, 0)}),
        ({}, {"num_groups": 2}),
    ],
)
def test_other_rules_go_step_by_step(taken, options, facts):
    router = LinearRouter(model_dim=D, num_experts=4, top_k=2, **options)
    router(make_tokens(8, torch.float32), RoutingContext(**facts))
    assert not taken


def test_plain_rules_take_the_operator(taken):
    class First(TokenChoiceRouter):
        def score(self, x_TD, context):
            return x_TD[:, : self.num_experts].float()

    x = make_tokens(8, torch.float32)
    for router in (
        LinearRouter(model_dim=D, num_experts=4, top_k=2, capacity_factor=1.0, batch_prioritized=True),
        First(model_dim=D, num_experts=4),
    ):
        router(x, RoutingContext(top_k=3))
        assert taken.pop()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    plain, steps = make_pair(
        num_experts=5, top_k=2, capacity_factor=1.0, batch_prioritized=True, renormalize=True
    )
    compiled = torch.compile(plain, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (9, 13) if dynamic else (9,):
        x = make_tokens(tokens)
        got, want = compiled(x, RoutingContext()), steps(x, RoutingContext())
        assert_same_routing(got, want)
        for mine, true in zip(gradients(plain, got, x), gradients(steps, want, x), strict=True):
            assert_close(mine, true)
    torch._dynamo.reset()


def test_checkpointed_and_under_autocast():
    plain, steps = make_pair(dtype=torch.float32, num_experts=5, top_k=2)
    x = make_tokens(9, torch.float32)
    want = steps(x, RoutingContext())
    with torch.autocast("cpu", torch.bfloat16):
        got = checkpoint(copy.deepcopy(plain), x, RoutingContext(), use_reentrant=False)
        assert_same_routing(plain(x, RoutingContext()), want)
    assert_same_routing(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.weight_N.square().sum(), x),
        torch.autograd.grad(want.weight_N.square().sum(), x),
    )
