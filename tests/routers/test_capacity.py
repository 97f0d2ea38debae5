"""The capacity rule and the order in which tokens take their places."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert import CapacityRouting, MoE, MoEConfig, RoutingContext
from flexpert.routers.capacity import assign, capacity_of

FACTORS = [1.25, 1.0, 0.5, 0.2, -0.5, -1.0, -2.0, 0.0, None]


def route(ids, *, num_experts, capacity_factor, top_k=None, priority=None, weights=None, **facts):
    """The routing of given choices, a list of experts per token."""
    ids_TK = torch.tensor(ids)
    context = RoutingContext(**facts)
    top_k = ids_TK.shape[1] if top_k is None else top_k
    capacity = capacity_of(capacity_factor, top_k, num_experts, context, len(ids))
    weight_TK = torch.rand(ids_TK.shape) if weights is None else weights
    priority_T = None if priority is None else torch.tensor(priority)
    return assign(
        ids_TK,
        weight_TK,
        num_experts,
        context=context,
        capacity=capacity,
        priority_T=priority_T,
        trim=False,
    )


def tokens_of(routing):
    """The tokens of each expert, in order of priority."""
    total = int(routing.counts_E.sum())
    return [part.tolist() for part in routing.unit_N[:total].split(routing.counts_E.tolist())]


@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "factor", "limit"),
    [
        (64, 8, 1, 1.0, 8),
        (64, 8, 2, 1.0, 16),
        (65, 8, 2, 1.0, 18),  # ceil(65 / 8) = 9
        (64, 8, 1, 1.25, 10),
        (7, 8, 3, 1.25, 3),  # int(1.25) = 1
        (7, 8, 3, 0.01, 3),  # never 0
        (0, 8, 2, 1.0, 2),
        (10, 3, 2, -0.5, 4),
        (10, 3, 2, 0.5, 4),
        (49 * 64, 32, 1, 1.25, 122),
    ],
)
def test_formula(tokens, num_experts, top_k, factor, limit):
    capacity = capacity_of(factor, top_k, num_experts, RoutingContext(), tokens)
    assert (capacity.limit, capacity.bound) == (limit, limit)
    mask = torch.ones(tokens, dtype=torch.bool)
    masked = capacity_of(factor, top_k, num_experts, RoutingContext(mask=mask), tokens)
    assert masked.limit.tolist() == [limit]


@settings(max_examples=100)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    factor=st.floats(-3, 3).filter(bool),
)
def test_padding_has_no_share_in_the_limit(sizes, num_experts, top_k, factor):
    group = max(sizes) + 2
    mask = torch.stack([torch.arange(group) < size for size in sizes]).flatten()
    context = RoutingContext(mask=mask, num_groups=len(sizes))
    capacity = capacity_of(factor, top_k, num_experts, context, len(mask))
    want = [top_k * max(1, int(abs(factor) * math.ceil(size / num_experts))) for size in sizes]
    assert capacity.limit.tolist() == want
    assert capacity.bound >= max(want)


@pytest.mark.parametrize("factor", [None, 0, 0.0, -0.0])
def test_no_limit(factor):
    assert capacity_of(factor, 2, 4, RoutingContext(), 10) is None


def test_every_first_choice_before_any_second():
    ids = [[0, 1], [1, 0], [0, 1], [1, 0], [1, 0]]
    routing = route(ids, num_experts=2, capacity_factor=None)
    assert tokens_of(routing) == [[0, 2, 1, 3, 4], [1, 3, 4, 0, 2]]
    routing = route(ids, num_experts=2, capacity_factor=0.5)  # 2 * int(0.5 * 3) = 2 rows each
    assert tokens_of(routing) == [[0, 2], [1, 3]]


def test_priority_orders_within_a_choice_only():
    ids = [[0, 1], [1, 0], [0, 1], [1, 0], [1, 0]]
    routing = route(ids, num_experts=2, capacity_factor=None, priority=[0.1, 0.5, 0.9, 0.5, 0.2])
    assert tokens_of(routing) == [[2, 0, 1, 3, 4], [1, 3, 4, 2, 0]]


def test_absent_experts_take_no_place():
    ids = [[3, 0], [3, 3], [0, 3], [0, 3]]  # 3 of 3 experts: none
    routing = route(ids, num_experts=3, capacity_factor=0.5)
    assert tokens_of(routing) == [[2, 3], [], []]
    assert routing.weight_N[2:].tolist() == [0.0] * 6


def test_group_limits_are_apart():
    ids = [[0]] * 6
    routing = route(ids, num_experts=1, capacity_factor=0.5, num_groups=2)
    assert tokens_of(routing) == [[0, 3]]
    assert routing.capacity_E.tolist() == [2]


def masked_routing(capacity_factor, *, tokens=64, num_experts=8, top_k=2, prioritized=True, groups=1, seed=0):
    torch.manual_seed(seed)
    config = MoEConfig(
        model_dim=6,
        hidden_dim=4,
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=capacity_factor,
        batch_prioritized=prioritized,
    )
    layer = MoE(config).double()
    x = torch.randn(tokens, 6, dtype=torch.float64)
    context = RoutingContext(mask=torch.rand(tokens) > 0.2, num_groups=groups)
    _, info = layer(x, context=context, return_info=True)
    return info, context


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor", FACTORS)
def test_who_is_dropped(factor, top_k, prioritized, groups):
    """A dropped choice finds its expert full, of rows no less important: for every sign of the factor."""
    info, context = masked_routing(factor, top_k=top_k, prioritized=prioritized, groups=groups)
    routing, tokens = info.routing, 64
    ids_TK = routing.aux["ids_TK"]
    best_T = routing.probs_TE.detach().max(-1).values
    rank = {(t, int(e)): k for t, row in enumerate(ids_TK) for k, e in enumerate(row) if e < 8}
    kept = {(t, e) for e, rows in enumerate(tokens_of(routing)) for t in rows}
    assert kept <= rank.keys()
    dropped = rank.keys() - kept
    assert info.stats.dropped == len(dropped)
    assert info.stats.selected_E.sum() == len(rank) == int(context.mask.sum()) * top_k
    assert info.stats.load_E.sum() == len(kept)
    if not factor:
        assert not dropped

    def importance(t, e):
        return (rank[t, e], -float(best_T[t]) if prioritized else t)

    size = tokens // groups
    for group in range(groups):
        real = int(context.mask[group * size : (group + 1) * size].sum())
        limit = math.inf if not factor else top_k * max(1, int(abs(factor) * math.ceil(real / 8)))
        for expert in range(8):
            mine = [t for t, e in kept if e == expert and t // size == group]
            assert len(mine) <= limit
            lost = [t for t, e in dropped if e == expert and t // size == group]
            if lost:
                assert len(mine) == limit
                assert max(importance(t, expert) for t in mine) <= min(importance(t, expert) for t in lost)
    if factor and abs(factor) <= 0.5:
        assert dropped  # or the test would say nothing


def test_a_negative_factor_keeps_the_rows_of_its_absolute_value():
    for prioritized in (False, True):
        fixed, _ = masked_routing(0.5, prioritized=prioritized)
        adaptive, _ = masked_routing(-0.5, prioritized=prioritized)
        assert tokens_of(fixed.routing) == tokens_of(adaptive.routing)
        assert torch.equal(fixed.stats.dropped, adaptive.stats.dropped)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("factor", [0.5, -1.25, 2.0])
def test_buffers_hold_the_rows(factor, groups):
    info, _ = masked_routing(factor, groups=groups)
    routing = info.routing
    assert isinstance(routing, CapacityRouting)
    total = int(routing.counts_E.sum())
    places = list(zip(routing.expert_N()[:total].tolist(), routing.slot_N[:total].tolist(), strict=True))
    assert len(set(places)) == total
    assert all(0 <= slot < routing.buffer_capacity for _, slot in places)
    assert (routing.counts_E <= routing.capacity_E).all()
    assert (routing.capacity_E <= routing.buffer_capacity).all()
    for expert in range(8):
        slots = [slot for e, slot in places if e == expert]
        assert slots == sorted(slots)


def test_dropless_has_no_buffer():
    info, _ = masked_routing(None)
    assert not isinstance(info.routing, CapacityRouting)
    assert info.stats.capacity == 0


def test_capacity_of_ranks_counts_the_ranks():
    torch.manual_seed(0)
    layer = MoE(MoEConfig(model_dim=6, hidden_dim=4, num_experts=4, top_k=1))
    context = RoutingContext(ranks=(0, 1, 2), capacity_factor=1.0)
    _, info = layer(torch.randn(8, 6), context=context, return_info=True)
    assert info.routing.capacity_E.tolist() == [3 * 2] * 4
