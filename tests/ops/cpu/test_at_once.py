"""Several operators in one native call: their bits one after the other, on every set of instructions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexpert import ops
from flexpert.ops import at_once, packing, select
from flexpert.ops.handles import ExpertMLP, TokenChoice
from tests.ops.conftest import relative_error

pytestmark = pytest.mark.usefixtures("live")

ANY = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SIZES = st.sampled_from([1, 7, 17, 32, 33, 64, 255])
EPS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def make(dtype, experts, model, hidden, output, gated, biases, seed=0):
    g = torch.Generator().manual_seed(seed)
    inner = (2, hidden) if gated else (hidden,)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    return ExpertMLP(
        normal(experts, *inner, model, scale=model**-0.5),
        normal(experts, *inner) if biases else None,
        normal(experts, output, hidden, scale=hidden**-0.5),
        normal(experts, output) if biases else None,
        "silu",
    )


def tokens_of(dtype, tokens, model, seed=1):
    return torch.randn(tokens, model, generator=torch.Generator().manual_seed(seed)).to(dtype)


def choices(tokens, experts, top_k, seed=2):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)])
    return ids, torch.rand(tokens, top_k, generator=g)


@pytest.fixture
def taken(monkeypatch):
    """The names of the shortcuts that were taken, in order."""
    names = []
    find = select.shortcut

    def spy(name, dtype, *, packed):
        def run(*args):
            result = find(name, dtype, packed=packed)(*args)
            if result is not None:
                names.append(name)
            return result

        return run

    monkeypatch.setattr(select, "shortcut", spy)
    return names


def in_steps(function, *args):
    """Without the shortcut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at_once, "FEW_TOKENS", 0)
        return function(*args)


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ANY
@given(
    tokens=st.sampled_from([1, 2, 7, 17, 33, 64]),
    experts=st.sampled_from([1, 2, 5, 17]),
    share=st.floats(0, 1),
    model=SIZES,
    hidden=SIZES,
    output=st.sampled_from([1, 17, 32, 33, 64]),
    gated=st.booleans(),
    biases=st.booleans(),
    absent=st.booleans(),
    number=st.sampled_from([1, 2, 3]),
)
def test_given_choices(
    threads, taken, dtype, tokens, experts, share, model, hidden, output, gated, biases, absent, number
):
    taken.clear()
    mlp = make(dtype, experts, model, hidden, output, gated, biases)
    x = tokens_of(dtype, tokens, model)
    ids, weight = choices(tokens, experts, 1 + int(share * (experts - 1)))
    if absent:
        ids[::3, 0] = experts
        ids[1::3, -1] = -1
    threads(number)
    with torch.no_grad():
        got = ops.chosen_mlp(x, ids, weight, mlp)
        want = in_steps(ops.chosen_mlp, x, ids, weight, mlp)
    assert taken == ["chosen_mlp"]
    assert torch.equal(got, want)
    wide = ExpertMLP(*(None if t is None else t.double() for t in mlp[:4]), mlp.activation)
    with ops.use_backend("reference"):
        true = ops.chosen_mlp(x.double(), ids, weight.double(), wide)
    assert relative_error(got, true) <= EPS[dtype]


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ANY
@given(
    tokens=st.sampled_from([1, 7, 33, 64]),
    experts=st.sampled_from([1, 8, 17]),
    share=st.floats(0, 1),
    model=SIZES,
    scoring=st.sampled_from(sorted(ops.SCORINGS)),
    biased=st.booleans(),
    normalize=st.booleans(),
    limit=st.sampled_from([None, 1, 4]),
    prioritized=st.booleans(),
    number=st.sampled_from([1, 2, 3]),
)
def test_whole_layers(
    found, threads, taken, dtype, tokens, experts, share, model, scoring, biased, normalize, limit,
    prioritized, number,
):  # fmt: skip
    taken.clear()
    mlp = make(dtype, experts, model, 40, model, True, biased)
    x = tokens_of(dtype, tokens, model)
    choice = TokenChoice(
        tokens_of(dtype, experts, model, 3), 1 + int(share * (experts - 1)), scoring,
        torch.linspace(-0.5, 0.5, experts) if biased else None, normalize, 1.5, limit, prioritized,
    )  # fmt: skip
    threads(number)
    with torch.no_grad():
        got, want = ops.routed_mlp(x, choice, mlp), in_steps(ops.routed_mlp, x, choice, mlp)
    assert taken == ["routed_mlp"]
    assert torch.equal(got, want)


@pytest.mark.each_cap
@pytest.mark.parametrize("tokens", [1, 3, 20, 40, 64])
def test_packed_weights_many_rows_and_threads(threads, tokens):
    """One expert of all tokens among others, so that some experts have more rows than are few."""
    mlp = make(torch.bfloat16, 9, 96, 64, 33, True, True)
    w1, w2 = packing.pack_mlp(mlp.w1, mlp.w2)
    packed = mlp._replace(w1=w1, w2=w2, packed=(64, 33))
    x, (ids, weight) = tokens_of(torch.bfloat16, tokens, 96), choices(tokens, 9, 3)
    ids[:, 0] = torch.where((ids == 4).any(1), ids[:, 0], 4)
    for experts in (mlp, packed):
        found = []
        for number in (1, 2, 3):
            threads(number)
            with torch.no_grad():
                found.append(ops.chosen_mlp(x, ids, weight, experts))
                found.append(in_steps(ops.chosen_mlp, x, ids, weight, experts))
        assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_in_its_token(poisoned, dtype):
    mlp = make(dtype, 4, 64, 64, 64, True, False)
    choice = TokenChoice(tokens_of(dtype, 4, 64, 3), 2)
    x = tokens_of(dtype, 20, 64)
    with torch.no_grad():
        want = ops.routed_mlp(x, choice, mlp)
        x[5], x[7, 3] = float("nan"), float("inf")
        got = ops.routed_mlp(x, choice, mlp)
    others = [t for t in range(20) if t not in (5, 7)]
    assert torch.equal(got[others], want[others])
    assert got[5].isnan().all()
    assert want.isfinite().all()


def test_not_taken_where_somebody_watches_or_wants_a_gradient(taken):
    mlp, x = make(torch.float32, 4, 8, 16, 8, False, True), tokens_of(torch.float32, 5, 8)
    ids, weight = choices(5, 4, 2)
    with torch.no_grad():
        want = ops.chosen_mlp(x, ids, weight, mlp)
    assert taken == ["chosen_mlp"]
    trained = mlp._replace(w1=mlp.w1.clone().requires_grad_())
    y = ops.chosen_mlp(x, ids, weight, trained)
    assert torch.equal(y.detach(), want)
    assert torch.autograd.grad(y.sum(), trained.w1)[0].isfinite().all()
    with torch.no_grad():
        compiled = torch.compile(ops.chosen_mlp, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, ids, weight, mlp), want)
        with torch.profiler.profile():
            assert torch.equal(ops.chosen_mlp(x, ids, weight, mlp), want)
        for backend in ("portable", "reference"):
            with ops.use_backend(backend):
                assert relative_error(ops.chosen_mlp(x, ids, weight, mlp), want.double()) < 1e-5
        strided = mlp._replace(w2=mlp.w2.mT.contiguous().mT)
        assert torch.equal(ops.chosen_mlp(x, ids, weight, strided), want)
        many = torch.cat([x] * 13)
        ops.chosen_mlp(many, torch.cat([ids] * 13), torch.cat([weight] * 13), mlp)
        ops.chosen_mlp(x[:0], ids[:0], weight[:0], mlp)
    assert taken == ["chosen_mlp"]
