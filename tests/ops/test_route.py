"""Routing in one operator and the linear score, against naive float64 loops: forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert import ops
from flexpert.core.errors import ConfigError, FlexpertError

SCORINGS = sorted(ops.SCORINGS)
LEARNED = sorted(ops.SCORINGS.keys() - {"uniform"})


def make_logits(tokens, experts, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def gradient(routes, logits):
    generator = torch.Generator().manual_seed(5)
    outputs = [routes.score_TE, routes.weight_N]
    if not routes.score_TE.requires_grad:  # uniform ones
        return torch.zeros_like(logits)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    return torch.autograd.grad(outputs, logits, grads)[0]


def test_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
    routes = ops.route(logits, 2, "sigmoid", limit=1, prioritized=True, scale=2.0)
    assert routes.ids_TK.tolist() == [[0, 1], [0, 2], [1, 2]]
    # First choices of tokens 1, 0, 2 (by their best scores), then second ones: token 1 wins expert 0 from 0.
    assert routes.counts_E.tolist() == [1, 1, 1]
    assert routes.unit_N.tolist() == [1, 2, 1, 0, 0, 2]
    assert routes.order_N.tolist() == [1, 2, 3 + 1, 0, 3 + 0, 3 + 2]
    want = 2 * torch.sigmoid(torch.tensor([3.0, 2.0, 1.0]))
    torch.testing.assert_close(routes.weight_N, torch.cat([want, torch.zeros(3)]))
    assert routes.slot_N[:3].tolist() == [0, 0, 0]
    shared = ops.route(logits, 2, bias_E=torch.tensor([-9.0, 0.0, 0.0]), normalize=True)
    assert sorted(shared.ids_TK[0].tolist()) == [1, 2]
    assert shared.slot_N.shape == (0,)
    weight_T = torch.zeros(3).index_add(0, shared.unit_N, shared.weight_N)
    torch.testing.assert_close(weight_T, torch.ones(3))


@settings(max_examples=150)
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 17]),
    shape=st.integers(1, 9).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
    scoring=st.sampled_from(SCORINGS),
    biased=st.booleans(),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    limit=st.sampled_from([None, 0, 1, 3, 100]),
    prioritized=st.booleans(),
)
def test_against_loops(tokens, shape, scoring, biased, normalize, scale, limit, prioritized):
    experts, top_k = shape
    logits = make_logits(tokens, experts)
    bias = torch.linspace(-0.5, 0.5, experts) if biased else None
    rules = {
        "bias_E": bias,
        "normalize": normalize,
        "scale": scale,
        "limit": limit,
        "prioritized": prioritized,
    }
    got = ops.route(logits, top_k, scoring, **rules)
    with ops.use_backend("reference"):
        want = ops.route(logits, top_k, scoring, **rules)
    for name, mine, true in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(mine, true, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(gradient(got, logits), gradient(want, logits))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scoring", LEARNED)
def test_gradcheck(scoring, normalize):
    def differentiable(logits):
        routes = ops.route(logits, 2, scoring, normalize=normalize, limit=2, scale=1.5, prioritized=True)
        return routes.score_TE, routes.weight_N

    assert torch.autograd.gradcheck(differentiable, make_logits(5, 4))


@pytest.mark.parametrize("which", ["score_TE", "weight_N"])
def test_gradient_through_one_output_alone(which):
    logits = make_logits(6, 4)
    with ops.use_backend("reference"):
        (want,) = torch.autograd.grad(getattr(ops.route(logits, 2), which).square().sum(), logits)
    (got,) = torch.autograd.grad(getattr(ops.route(logits, 2), which).square().sum(), logits)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scoring", LEARNED)
def test_scores_that_vanish_have_finite_gradients(scoring):
    logits = torch.tensor([[-1e4, -2e4, 0.0], [-1e30, -200.0, -150.0]], requires_grad=True)
    routes = ops.route(logits, 3, scoring, normalize=True)
    (grad,) = torch.autograd.grad(routes.weight_N.square().sum(), logits)
    assert routes.weight_N.isfinite().all()
    assert grad.isfinite().all()


def test_a_nan_stays_in_its_token():
    logits = make_logits(6, 4, dtype=torch.float32).detach()
    want = ops.route(logits, 2)
    logits[3, 1] = float("nan")
    routes = ops.route(logits, 2)
    assert ((routes.ids_TK >= 0) & (routes.ids_TK < 4)).all()
    others = torch.arange(6) != 3
    assert torch.equal(routes.score_TE[others], want.score_TE[others])
    assert torch.equal(routes.ids_TK[others], want.ids_TK[others])
    assert routes.order_N.sort().values.tolist() == list(range(12))


def test_second_derivatives_are_refused():
    logits, x, w = make_logits(3, 4), make_logits(3, 5), make_logits(4, 5)
    calls = {
        "route": lambda: ops.route(logits, 2).weight_N.square().sum(),
        "router_logits": lambda: ops.router_logits(x, w).square().sum(),
    }
    for name, call in calls.items():
        leaves = [logits] if name == "route" else [x, w]
        first = torch.autograd.grad(call(), leaves, create_graph=True)
        with pytest.raises(FlexpertError, match=f"flexpert::{name} cannot be differentiated twice"):
            torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)


def test_unknown_scoring_lists_the_names():
    with pytest.raises(ConfigError, match="unknown scoring 'equal'; choose one of: softmax, sigmoid"):
        ops.route(torch.zeros(1, 2), 1, "equal")


@pytest.mark.parametrize("limit", [-1, 2])
@pytest.mark.parametrize("prioritized", [False, True])
def test_opcheck(limit, prioritized):
    op, bias = torch.ops.flexpert, torch.zeros(4)
    for logits in (make_logits(5, 4), make_logits(5, 4, dtype=torch.float32)):
        torch.library.opcheck(op.route, (logits, 2, "sigmoid", bias, True, 2.0, limit, prioritized))
        torch.library.opcheck(op.route, (logits.detach(), 1, "softmax", None, False, 1.0, limit, prioritized))
    for dtype in (torch.float64, torch.bfloat16):
        x, w = make_logits(3, 5, dtype=dtype), make_logits(4, 5, dtype=dtype)
        torch.library.opcheck(op.router_logits, (x, w))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def step(x, w):
        routes = ops.route(ops.router_logits(x, w), 2, normalize=True, limit=len(x) // 2, prioritized=True)
        return routes.score_TE, routes.weight_N, routes.unit_N, routes.counts_E, routes.slot_N

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    w = make_logits(4, 6, dtype=torch.float32)
    for tokens in (5, 8) if dynamic else (5,):
        x = make_logits(tokens, 6, dtype=torch.float32)
        got, want = compiled(x, w), step(x, w)
        for mine, true in zip(got, want, strict=True):
            assert torch.equal(mine, true)
        assert torch.equal(
            torch.autograd.grad(got[1].square().sum(), w)[0],
            torch.autograd.grad(want[1].square().sum(), w)[0],
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_of_the_values_as_they_are(assert_same, dtype):
    x, w = (make_logits(n, 30, seed=n, dtype=dtype) for n in (7, 5))
    logits = ops.router_logits(x, w)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    leaves = {"x": x, "w": w}
    if dtype.itemsize == 2:  # the result is in fp32 and held to its tolerance
        leaves = {}
    assert_same(lambda: logits, lambda: wide[0] @ wide[1].T, leaves, dict(zip("xw", wide, strict=True)))
    got = torch.autograd.grad(ops.router_logits(x, w), [x, w], torch.ones_like(logits))
    want = torch.autograd.grad(wide[0] @ wide[1].T, wide, torch.ones_like(logits).double())
    for mine, true, leaf in zip(got, want, (x, w), strict=True):
        assert mine.dtype == leaf.dtype
        torch.testing.assert_close(mine, true.to(dtype))


def test_no_gradient_is_made_for_what_needs_none():
    x, w = make_logits(3, 5), make_logits(4, 5)
    (only,) = torch.autograd.grad(ops.router_logits(x.detach(), w).sum(), w)
    both = torch.autograd.grad(ops.router_logits(x, w).sum(), [x, w])
    assert torch.equal(only, both[1])
    with torch.no_grad():
        assert not ops.route(ops.router_logits(x, w), 2).weight_N.requires_grad
