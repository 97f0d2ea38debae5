"""Native routing: scores against float64, and everything after them exactly as plain PyTorch orders them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexpert import ops
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError, InputError
from flexpert.ops import portable, portable_route, reference
from flexpert.ops.cpu import route as native_route
from flexpert.routers import LinearRouter

pytestmark = [pytest.mark.usefixtures("live", "poisoned"), pytest.mark.each_cap]

SCORINGS = sorted(ops.SCORINGS)
LEARNED = sorted(ops.SCORINGS.keys() - {"uniform"})
ANY_SHAPE = settings(
    max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make_logits(tokens, experts, seed=0, scale=1.0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * scale


def check(logits, top_k, scoring, bias, normalize, scale, limit, prioritized):
    """Scores and weights by value; choices and order, of these scores, bit by bit; the lower expert first."""
    routes = ops.route(
        logits, top_k, scoring, bias_E=bias, normalize=normalize, scale=scale, limit=limit,
        prioritized=prioritized,
    )  # fmt: skip
    (tokens, experts), score = logits.shape, routes.score_TE
    torch.testing.assert_close(score, ops.SCORINGS[scoring](logits), rtol=2e-6, atol=1e-37)
    ranking = portable_route.ranked_by(scoring, logits, score)
    ranking = ranking if bias is None else ranking + bias
    ids = ranking.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(routes.ids_TK, ids)
    best = score.amax(-1) if prioritized else torch.zeros(tokens)
    first = best.argsort(descending=True, stable=True)
    capacity = None if limit is None else torch.full((experts,), limit)
    order, counts = portable.assign(ids[first].T.reshape(-1), experts, capacity)
    unit, choice = first[order % max(tokens, 1)], order // max(tokens, 1)
    assert torch.equal(routes.counts_E, counts)
    assert torch.equal(routes.unit_N, unit)
    assert torch.equal(routes.order_N, choice * tokens + unit)
    weight = score.double().gather(1, ids)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-20) if normalize else weight
    rows = torch.arange(len(order))
    weight = (weight * scale).T.reshape(-1)[routes.order_N].where(rows < counts.sum(), 0.0)
    torch.testing.assert_close(routes.weight_N.double(), weight, rtol=1e-6, atol=1e-37)
    places = portable_route.places(rows, counts) if limit is not None else rows[:0]
    assert torch.equal(routes.slot_N, places)


def test_names_are_those_of_python():
    assert sorted(native_route.SCORINGS) == SCORINGS


@ANY_SHAPE
@given(
    tokens=st.sampled_from([0, 1, 7, 17, 33, 255]),
    experts=st.sampled_from([1, 2, 5, 8, 15, 16, 17, 64, 100, 256]),
    share=st.floats(0, 1),
    scoring=st.sampled_from(SCORINGS),
    biased=st.booleans(),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    fill=st.sampled_from([None, 0.0, 0.3, 1.0, 2.0]),
    prioritized=st.booleans(),
    tied=st.booleans(),
    number=st.sampled_from([1, 2, 3]),
)
def test_any_shape(
    threads, tokens, experts, share, scoring, biased, normalize, scale, fill, prioritized, tied, number
):
    threads(number)
    top_k = 1 + int(share * (experts - 1))
    logits = make_logits(tokens, experts)
    logits = logits.round() if tied else logits
    bias = torch.linspace(-0.5, 0.5, experts) if biased else None
    limit = None if fill is None else int(fill * tokens * top_k / experts)
    check(logits, top_k, scoring, bias, normalize, scale, limit, prioritized)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(4096, 8, 2), (4099, 64, 6), (5000, 256, 1)])
def test_same_bits_for_any_number_of_threads(threads, tokens, experts, top_k, prioritized):
    logits = make_logits(tokens, experts)
    rules = {"normalize": True, "limit": tokens * top_k // experts, "prioritized": prioritized}
    results = []
    for number in (1, 2, 3, 7):
        threads(number)
        check(logits, top_k, "softmax", None, True, 1.0, rules["limit"], prioritized)
        wanted = logits.clone().requires_grad_()
        routes = ops.route(wanted, top_k, **rules)
        grad = torch.autograd.grad(routes.weight_N.square().sum() + routes.score_TE.square().sum(), wanted)[0]
        results.append([*routes, grad])
    for other in results[1:]:
        for mine, true in zip(other, results[0], strict=True):
            assert torch.equal(mine, true)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_scores_hold_far_out_and_near_zero(scoring):
    far = torch.cat(
        [torch.linspace(-30, 0, 301), torch.linspace(-1e-3, 1e-3, 101), torch.linspace(0, 30, 301)]
    )
    logits = torch.stack([far, torch.zeros_like(far), -far], 1) if scoring == "softmax" else far[:, None]
    want = ops.SCORINGS[scoring](logits.double())
    got = ops.route(logits, 1, scoring).score_TE.double()
    torch.testing.assert_close(got, want, rtol=5e-6 if scoring == "softmax" else 2e-6, atol=0)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_infinite_and_huge_logits(scoring):
    inf, huge = float("inf"), torch.finfo(torch.float32).max
    logits = torch.tensor(
        [[0.0, -inf, 3.0], [-huge, 0.0, huge], [-100.0, 0.0, -90.0], [88.0, 1.0, -inf], [huge, huge, -huge]]
    )
    want = ops.SCORINGS[scoring](logits)
    routes = ops.route(logits, 3, scoring)
    torch.testing.assert_close(routes.score_TE, want, rtol=2e-6, atol=1e-37)
    ranking = portable_route.ranked_by(scoring, logits, routes.score_TE)
    assert torch.equal(routes.ids_TK, ranking.sort(dim=-1, descending=True, stable=True).indices)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_nan_stays_in_its_token(scoring, prioritized):
    logits = make_logits(40, 19)
    want = ops.route(logits, 5, scoring)
    nan = float("nan")
    logits[3, 1] = logits[7] = nan
    logits[9, 4] = -nan
    logits[11, 0] = float("inf")
    routes = ops.route(logits, 5, scoring, limit=4, prioritized=prioritized, normalize=True)
    others = torch.tensor([t not in (3, 7, 9, 11) for t in range(40)])
    assert torch.equal(routes.score_TE[others], want.score_TE[others])
    assert torch.equal(routes.ids_TK[others], want.ids_TK[others])
    for ids in routes.ids_TK.tolist():
        assert len(set(ids)) == 5
        assert set(ids) <= set(range(19))
    assert torch.equal(routes.order_N.sort().values, torch.arange(200))
    assert routes.counts_E.max() <= 4


@ANY_SHAPE
@given(
    tokens=st.sampled_from([0, 1, 7, 33]),
    experts=st.sampled_from([1, 2, 8, 17, 40]),
    share=st.floats(0, 1),
    scoring=st.sampled_from(LEARNED),
    normalize=st.booleans(),
    limit=st.sampled_from([None, 1, 4]),
    given_grads=st.sampled_from(["both", "score", "weight"]),
)
def test_gradient_against_loops(tokens, experts, share, scoring, normalize, limit, given_grads):
    logits = make_logits(tokens, experts).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    rules = {"normalize": normalize, "scale": 1.5, "limit": limit}
    top_k = 1 + int(share * (experts - 1))
    routes = ops.route(logits, top_k, scoring, **rules)
    with ops.use_backend("reference"):
        true = ops.route(wide, top_k, scoring, **rules)
    assert torch.equal(routes.order_N, true.order_N)
    names = {"both": ["score_TE", "weight_N"], "score": ["score_TE"], "weight": ["weight_N"]}[given_grads]
    grads = [torch.randn(getattr(routes, n).shape, generator=torch.Generator().manual_seed(1)) for n in names]
    (got,) = torch.autograd.grad([getattr(routes, n) for n in names], logits, grads)
    (want,) = torch.autograd.grad([getattr(true, n) for n in names], wide, [g.double() for g in grads])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_vanishing_scores_have_the_gradient_of_plain_pytorch():
    logits = torch.tensor([[-1e4, -2e4, 0.0], [-40.0, -20.0, -1.0], [-1e-3, 1e-3, 30.0]], requires_grad=True)
    for scoring in LEARNED:
        (want,) = torch.autograd.grad(ops.SCORINGS[scoring](logits)[:, :2].sum(), logits)
        (got,) = torch.autograd.grad(ops.route(logits, 1, scoring).score_TE[:, :2].sum(), logits)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-18)


def test_uniform_scores_have_no_gradient():
    logits = make_logits(7, 5).requires_grad_()
    routes = ops.route(logits, 2, "uniform")
    assert not routes.weight_N.requires_grad
    assert not routes.score_TE.requires_grad


def test_inputs_of_any_strides():
    logits, bias = make_logits(9, 6), torch.linspace(-1, 1, 6)
    want = ops.route(logits, 2, bias_E=bias)
    got = ops.route(logits.T.contiguous().T, 2, bias_E=bias.repeat_interleave(2)[::2])
    for mine, true in zip(got, want, strict=True):
        assert torch.equal(mine, true)
    expanded = logits.clone().requires_grad_()
    ops.route(expanded, 2).score_TE.sum(0)[1].backward()  # an expanded gradient
    assert expanded.grad.isfinite().all()


def test_what_does_not_fit_is_refused():
    logits, op = make_logits(3, 4), torch.ops.flexpert
    with pytest.raises(InputError, match="top_k=5 of 4 experts"):
        ops.route(logits, 5)
    with pytest.raises(InputError, match=r"bias_E is torch.float32 \(3,\), not torch.float32 \(4,\)"):
        ops.route(logits, 2, bias_E=torch.zeros(3))
    with pytest.raises(ConfigError, match="unknown scoring 'none'"):
        op.route(logits, 2, "none", None, False, 1.0, -1, False)
    with pytest.raises(InputError, match=r"w_ED is torch.float64 \(4, 4\), not torch.float32"):
        op.router_logits(logits, torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(InputError, match="capacity_B is"):
        ops.assign(torch.tensor([0]), 2, torch.tensor([1]))
    score, ids, order, _, weight, counts, _ = ops.route(logits, 2)
    rules = "softmax", False, 1.0
    with pytest.raises(InputError, match="outside its range"):
        op.route_backward(score, ids + 4, order, counts, None, weight, *rules)
    with pytest.raises(InputError, match="outside its range"):
        op.route_backward(score, ids, order - 9, counts, None, weight, *rules)


@ANY_SHAPE
@given(
    keys=st.lists(st.integers(-2, 9), max_size=60),
    bins=st.integers(1, 8),
    capacity=st.none() | st.lists(st.integers(-1, 9), min_size=8, max_size=8),
)
def test_assign(keys, bins, capacity):
    key = torch.tensor(keys, dtype=torch.int64)
    limit = None if capacity is None else torch.tensor(capacity[:bins])
    order, counts = ops.assign(key, bins, limit)
    want_order, want_counts = reference.assign(key, bins, limit)
    assert torch.equal(order, want_order)
    assert torch.equal(counts, want_counts)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_assign_many(threads, number):
    threads(number)
    key = torch.randint(-3, 70, (50_001,), generator=torch.Generator().manual_seed(0))
    for limit in (None, torch.randint(0, 1500, (64,), generator=torch.Generator().manual_seed(1))):
        for mine, true in zip(ops.assign(key, 64, limit), portable.assign(key, 64, limit), strict=True):
            assert torch.equal(mine, true)


@ANY_SHAPE
@given(
    tokens=st.sampled_from([0, 1, 2, 5, 7, 33, 64, 65]),
    size=st.sampled_from([1, 15, 16, 17, 255, 1000]),
    experts=st.sampled_from([1, 3, 4, 8, 9, 17, 65]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_logits(tokens, size, experts, dtype):
    x, w = make_logits(tokens, size, 1).to(dtype), make_logits(experts, size, 2).to(dtype)
    got, want = ops.router_logits(x, w), x.double() @ w.double().T
    assert got.dtype == torch.float32
    size_of_terms = x.double().abs() @ w.double().abs().T
    assert ((got.double() - want).abs() <= 1e-6 * size_of_terms).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_for_any_number_of_tokens_and_threads(threads, dtype):
    x, w = make_logits(64, 520, 1).to(dtype), make_logits(70, 520, 2).to(dtype)
    threads(1)
    want = ops.router_logits(x, w)
    for number in (1, 2, 3):
        threads(number)
        for tokens in (1, 3, 64):
            assert torch.equal(ops.router_logits(x[:tokens], w), want[:tokens])
    assert torch.equal(ops.router_logits(x.T.contiguous().T, w.T.contiguous().T), want)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("factor", [None, 1.0])
def test_a_router_is_the_same_on_it(factor, prioritized):
    torch.manual_seed(0)
    options = {"top_k": 3, "renormalize": True, "capacity_factor": factor, "batch_prioritized": prioritized}
    router = LinearRouter(model_dim=16, num_experts=12, **options)
    x = torch.randn(50, 16)
    got = router(x, RoutingContext())
    with ops.use_backend("portable"):
        want = router(x, RoutingContext())
    assert torch.equal(got.aux["ids_TK"], want.aux["ids_TK"])
    assert torch.equal(got.unit_N, want.unit_N)
    assert torch.equal(got.counts_E, want.counts_E)
    torch.testing.assert_close(got.weight_N, want.weight_N, rtol=3e-6, atol=0)
