"""The layer against a loop over tokens: outputs, choices, drops and every gradient."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert import MoE, MoEConfig, RoutingContext
from flexpert.testing import TOLERANCES, assert_close, naive_moe

ROUTERS = {
    "linear": "linear",
    "cosine": {"name": "cosine", "proj_dim": 5},
    "hash": "hash",
}
CAPACITIES = [None, 0.0, 1.0, 1.25, 0.5, -0.5]
D, F, E = 7, 9, 5


def make_layer(seed=0, dtype=torch.float64, **options):
    defaults = {"model_dim": D, "hidden_dim": F, "num_experts": E, "expert_bias": True}
    torch.manual_seed(seed)
    layer = MoE(MoEConfig(**{**defaults, **options}))
    for parameter in layer.parameters():  # biases too, which start at 0
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.to(dtype)


def make_input(tokens, dim=D, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def make_context(tokens, *, masked=False, seed=2, **facts):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, generator=generator) > 0.3 if masked else None
    ids = torch.randint(1000, (tokens,), generator=generator)
    return RoutingContext(mask=mask, token_ids=ids, **facts)


def gradients(y, x, layer, grad):
    leaves = {"x": x, **dict(layer.named_parameters())}
    values = (
        torch.autograd.grad(y, leaves.values(), grad, allow_unused=True, retain_graph=True)
        if y.requires_grad
        else []
    )
    given = dict(zip(leaves, values, strict=False))
    return {k: torch.zeros_like(v) if given.get(k) is None else given[k] for k, v in leaves.items()}


def compare(layer, x, context, tolerance=None, **overrides):
    """Output, choices, rows, weights, counts and gradients are those of the loops in float64."""
    truth, x_true = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    y, info = layer(x, context=context, return_info=True, **overrides)
    naive = naive_moe(truth, x_true, context=context, **overrides)
    assert y.dtype == x.dtype
    assert_close(y, naive.output, tolerance, name="output")

    routing = info.routing
    chosen = [[e for e in ids if e < routing.num_experts] for ids in routing.aux["ids_TK"].tolist()]
    assert chosen == naive.chosen
    counts = [len(rows) for rows in naive.kept]
    assert routing.counts_E.tolist() == counts
    assert routing.unit_N[: sum(counts)].tolist() == [t for rows in naive.kept for _, _, t in rows]
    assert_close(routing.weight_N[: sum(counts)], naive.weight_N, tolerance, name="weights")
    assert routing.weight_N[sum(counts) :].count_nonzero() == 0
    selected = sum(len(ids) for ids in naive.chosen)
    assert info.stats.selected_E.sum() == selected
    assert info.stats.dropped == selected - sum(counts)

    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    want = gradients(naive.output, x_true, truth, grad.double())
    for name, value in gradients(y, x, layer, grad).items():
        # Gradients that cancel are 0 up to rounding: of a renormalised weight alone, of a softmax over one.
        scale = 1e-3 * float(grad.double().norm())
        assert_close(value, want[name], tolerance, scale=scale, name=f"gradient of {name}")


# Every router, K and capacity; the other settings go round, so that each pair of values meets.
FLAGS = list(itertools.product([False, True], repeat=6))
CASES = list(itertools.product(ROUTERS, [1, 2, 3, E], CAPACITIES))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_layer_is_the_loop(case):
    router, top_k, capacity_factor = CASES[case]
    prioritized, masked, grouped, glu, weighted_input, fused = FLAGS[case * 11 % len(FLAGS)]
    layer = make_layer(
        router=ROUTERS[router],
        top_k=top_k,
        capacity_factor=capacity_factor,
        batch_prioritized=prioritized,
        expert="glu" if glu else "mlp",
        combine="weighted_input" if weighted_input else "sum",
        renormalize=bool(case % 2),
    )
    layer.transport.fused = layer.transport.fused and fused
    compare(layer, make_input(14), make_context(14, masked=masked, num_groups=1 + grouped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("router", "top_k", "capacity_factor"), [("linear", 2, 1.25), ("cosine", 1, None)])
def test_in_lower_precision(router, top_k, capacity_factor, fused, dtype):
    x = make_input(24, dtype=dtype)
    layer = make_layer(dtype=dtype, router=ROUTERS[router], top_k=top_k, capacity_factor=capacity_factor)
    layer.transport.fused = fused
    # Rounding accumulates over some five operations, each within the dtype's own tolerance.
    compare(layer, x, None, tolerance=None if dtype is torch.float32 else 2 * TOLERANCES[dtype])


@pytest.mark.parametrize(
    "combine", ["one_plus", {"name": "scaled", "scale": 2.5}, {"name": "scaled", "hard": True}]
)
def test_other_combines(combine):
    compare(make_layer(combine=combine, top_k=2, capacity_factor=1.0), make_input(11), None)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("expert", ["mlp", "glu"])
def test_shared_experts(expert, gate):
    layer = make_layer(expert=expert, num_shared_experts=2, shared_gate=gate, output_dim=4, top_k=2)
    compare(layer, make_input(6), make_context(6, masked=True))


@pytest.mark.parametrize("fused", [True, False])
def test_mixed_banks(fused):
    groups = [
        {"name": "mlp", "count": 2},
        {"name": "zero"},
        {"name": "copy", "count": 2},
        {"name": "constant"},
    ]
    layer = make_layer(expert=[*groups, {"name": "glu", "count": 3}], num_experts=9, top_k=3)
    layer.transport.fused = fused
    compare(layer, make_input(20), make_context(20, masked=True), capacity_factor=1.0)


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrt_softplus", "softmax"])
@pytest.mark.parametrize("renormalize", [False, True, "always"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_scorings_and_weights(scoring, renormalize, top_k):
    router = {"name": "linear", "scoring": scoring, "scale": 1.5, "selection_bias": True}
    layer = make_layer(router=router, renormalize=renormalize, top_k=top_k)
    layer.router.selection_bias.copy_(torch.linspace(-1, 1, E))
    compare(layer, make_input(9), None)


def test_overrides_of_one_call():
    layer = make_layer(top_k=1, renormalize=True, batch_prioritized=True)
    mask = torch.rand(12, E, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[3] = False  # no expert at all
    for overrides in ({"top_k": 3}, {"top_k": E, "capacity_factor": 0.5}, {"capacity_factor": -1.0}):
        compare(layer, make_input(12), None, **overrides)
        compare(layer, make_input(12), RoutingContext(expert_mask=mask), **overrides)
    compare(layer, make_input(12), RoutingContext(expert_mask=mask[0]), top_k=2)
    compare(layer, make_input(12), RoutingContext(ranks=(2, 0), capacity_factor=1.0))
    compare(layer, make_input(12), None)  # nothing stuck


@settings(max_examples=150)
@given(
    tokens=st.integers(0, 40),
    num_experts=st.integers(1, 9),
    dims=st.tuples(st.sampled_from([1, 3, 7, 17]), st.sampled_from([1, 5, 9])),
    router=st.sampled_from(sorted(ROUTERS)),
    capacity_factor=st.sampled_from([*CAPACITIES, 0.1, 3.0, -1.3]),
    flags=st.tuples(*[st.booleans()] * 6),
    data=st.data(),
)
def test_any_shape(tokens, num_experts, dims, router, capacity_factor, flags, data):
    prioritized, masked, glu, fused, bias, renormalize = flags
    top_k = data.draw(st.integers(1, num_experts), label="top_k")
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3) if tokens % g == 0]), label="groups")
    layer = make_layer(
        seed=data.draw(st.integers(0, 99), label="seed"),
        model_dim=dims[0],
        hidden_dim=dims[1],
        num_experts=num_experts,
        router=ROUTERS[router],
        top_k=top_k,
        capacity_factor=capacity_factor,
        batch_prioritized=prioritized,
        expert="glu" if glu else "mlp",
        expert_bias=bias,
        renormalize=renormalize,
    )
    layer.transport.fused = fused
    context = make_context(tokens, masked=masked, num_groups=groups)
    compare(layer, make_input(tokens, dims[0]), context)


# Groups and padding --------------------------------------------------------------------------------------

ALL_ROUTERS = {
    **ROUTERS,
    "top_p": {"name": "linear", "selection": "top_p"},
    "threshold": {"name": "linear", "selection": {"name": "threshold", "threshold": 0.2}},
    "group_limited": {
        "name": "linear",
        "selection": {"name": "group_limited", "groups": 3, "groups_kept": 2},
    },
    "sigmoid": {"name": "linear", "scoring": "sigmoid", "selection_bias": True},
    "expert_choice": "expert_choice",
    "cosine_choice": {"name": "expert_choice", "score": "cosine"},
    "soft": {"name": "soft", "slots_per_expert": 2},
}


def options_of(router, capacity_factor):
    drops = {} if router == "soft" else {"capacity_factor": capacity_factor}
    experts = {"num_experts": 6, "model_dim": 5}
    return {"router": ALL_ROUTERS[router], "top_k": 2, **drops, **experts}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("router", ALL_ROUTERS)
def test_groups_are_separate_calls(router, prioritized, masked):
    if router in ("soft", "expert_choice", "cosine_choice"):
        layer = make_layer(**options_of(router, 1.0))
    else:
        layer = make_layer(**options_of(router, 0.5), batch_prioritized=prioritized)
    x = make_input(30, 5)
    whole = make_context(30, masked=masked, num_groups=3)
    y, info = layer(x, context=whole, return_info=True)
    parts = []
    for i in range(3):
        piece = slice(10 * i, 10 * i + 10)
        mask = None if whole.mask is None else whole.mask[piece]
        context = RoutingContext(mask=mask, token_ids=whole.token_ids[piece])
        parts.append(layer(x[piece], context=context, return_info=True))
    assert_close(y, torch.cat([part for part, _ in parts]))
    assert torch.equal(info.routing.counts_E, sum(part.routing.counts_E for _, part in parts))
    assert info.stats.dropped == sum(part.stats.dropped for _, part in parts)
    assert info.stats.capacity == sum(part.stats.capacity for _, part in parts)


@pytest.mark.parametrize("garbage", [1e9, float("nan"), float("-inf")])
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("router", ALL_ROUTERS)
def test_padding_changes_nothing(router, capacity_factor, garbage):
    if capacity_factor and router == "soft":
        pytest.skip("soft routing has no capacity")
    losses = ["balance"] if router in ("soft", "hash") else ["balance", "entropy", "z"]
    layer = make_layer(**options_of(router, capacity_factor), losses=losses)
    x, context = make_input(17, 5), make_context(17, masked=True)
    mask = context.mask
    padded = x.detach().masked_fill(~mask[:, None], garbage).requires_grad_()
    y, info = layer(padded, context=context, return_info=True)
    alone = RoutingContext(token_ids=context.token_ids[mask])
    want, want_info = layer(x[mask], context=alone, return_info=True)
    assert_close(y[mask], want)
    assert y[~mask].count_nonzero() == 0

    assert torch.equal(info.routing.counts_E, want_info.routing.counts_E)
    for name in ("load_E", "selected_E", "dropped", "entropy", "max_violation", "capacity", "tokens"):
        torch.testing.assert_close(getattr(info.stats, name), getattr(want_info.stats, name), msg=name)
    grad = torch.randn_like(want)
    got_grads = gradients(y[mask], padded, layer, grad)
    want_grads = gradients(want, x, layer, grad)
    for name, value in got_grads.items():
        assert_close(value, want_grads[name], name=f"gradient of {name}")
    for name, term in info.losses.items():
        assert_close(term, want_info.losses[name], name=name)
        want_grads = gradients(want_info.losses[name], x, layer, None)
        for leaf, value in gradients(term, padded, layer, None).items():
            assert_close(value, want_grads[leaf], scale=1e-3, name=f"gradient of {name} at {leaf}")


def test_what_padding_holds_reaches_no_gradient_of_a_real_token():
    layer = make_layer(top_k=2, num_shared_experts=1)
    context = make_context(9, masked=True)
    x = make_input(9)
    other = x.detach().where(context.mask[:, None], 123.0).requires_grad_()
    y, z = layer(x, context=context), layer(other, context=context)
    assert_close(z[context.mask], y[context.mask])
    grad = torch.randn(int(context.mask.sum()), D, dtype=torch.float64)
    for name, value in gradients(z[context.mask], other, layer, grad).items():
        assert_close(value, gradients(y[context.mask], x, layer, grad)[name], name=name)


def test_the_loop_itself_by_hand():
    layer = make_layer(model_dim=1, hidden_dim=1, num_experts=2, activation="identity", expert_bias=False)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.experts.w1.fill_(1.0)
        layer.experts.w2.copy_(torch.tensor([[[10.0]], [[100.0]]]))
    x = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
    naive = naive_moe(layer, x, capacity_factor=0.5)
    p1 = torch.sigmoid(torch.tensor(2.0, dtype=torch.float64))  # softmax of (1, -1), of (-1, 1) likewise
    assert naive.chosen == [[0], [0], [1]]
    assert naive.kept == [[(0, 0, 0)], [(0, 0, 2)]]  # one row per expert: the second token is dropped
    assert_close(naive.output, torch.stack([10 * p1, 0 * p1, -100 * p1])[:, None])
    assert naive.weight_N.tolist() == pytest.approx([float(p1)] * 2)
