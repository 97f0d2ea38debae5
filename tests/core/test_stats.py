"""Statistics of a routing, counted again in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flexpert import MoE, MoEConfig, RoutingContext
from flexpert.core.stats import merge_stats, reduce_stats, selected_counts
from flexpert.testing import assert_close
from tests.ranks import run_ranks

D, E = 5, 4


def run(tokens=24, masked=True, router="linear", **options):
    torch.manual_seed(0)
    layer = MoE(MoEConfig(model_dim=D, hidden_dim=4, num_experts=E, router=router, **options)).double()
    mask = torch.rand(tokens) > 0.3 if masked else None
    _, info = layer(torch.randn(tokens, D).double(), context=RoutingContext(mask=mask), return_info=True)
    return info, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_values(top_k, masked):
    info, mask = run(masked=masked, top_k=top_k, capacity_factor=0.5)
    stats, routing = info.stats, info.routing
    real = [t for t in range(24) if mask is None or mask[t]]
    chosen = [e for t in real for e in routing.aux["ids_TK"][t].tolist()]
    selected = [chosen.count(e) for e in range(E)]
    assert stats.selected_E.tolist() == selected
    assert stats.load_E.tolist() == routing.counts_E.tolist()
    assert stats.dropped == sum(selected) - routing.counts_E.sum() > 0
    assert stats.drop_rate == stats.dropped / sum(selected)
    assert stats.tokens == len(real)
    assert stats.capacity == routing.capacity_E.sum()
    assert stats.max_violation.item() == pytest.approx(max(selected) / (sum(selected) / E) - 1, rel=1e-6)
    p = routing.probs_TE.detach()
    entropy = -sum(float(v) * math.log(v) for t in real for v in p[t]) / len(real)
    assert stats.entropy.item() == pytest.approx(entropy, rel=1e-6)
    assert all(value.dtype == torch.float32 for value in vars(stats).values())
    assert not any(value.requires_grad for value in vars(stats).values())


def test_entropy_of_scores_that_do_not_sum_to_one():
    info, _ = run(masked=False, router={"name": "linear", "scoring": "sigmoid"})
    p = info.routing.probs_TE.detach()
    p = p / p.sum(1, keepdim=True)
    assert info.stats.entropy.item() == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-6)


@pytest.mark.parametrize("router", ["linear", "expert_choice", "soft"])
@pytest.mark.parametrize("tokens", [0, 8])
def test_nothing_to_count(router, tokens):
    layer = MoE(MoEConfig(model_dim=D, hidden_dim=4, num_experts=E, router=router))
    context = RoutingContext(mask=torch.zeros(tokens, dtype=torch.bool))
    stats = layer(torch.randn(tokens, D), context=context, return_info=True)[1].stats
    assert stats.tokens == stats.dropped == stats.entropy == stats.max_violation == stats.drop_rate == 0
    assert all(value.isfinite().all() for value in vars(stats).values())


@pytest.mark.parametrize(
    "router", ["linear", "expert_choice", "soft", {"name": "linear", "selection": "top_p"}]
)
def test_counts_of_each_sequence(router):
    torch.manual_seed(0)
    layer = MoE(MoEConfig(model_dim=D, hidden_dim=4, num_experts=E, router=router, top_k=2))
    routing = layer(torch.randn(3, 4, D), return_info=True)[1].routing
    parts = selected_counts(routing, 3)
    assert parts.shape == (3, E)
    torch.testing.assert_close(parts.sum(0), selected_counts(routing)[0])
    if router == "linear":
        for i, ids in enumerate(routing.aux["ids_TK"].view(3, -1)):
            assert parts[i].tolist() == torch.bincount(ids, minlength=E).tolist()


def stats_of(layer, x, **facts):
    return layer(x, context=RoutingContext(**facts), return_info=True)[1].stats


@pytest.mark.parametrize(
    ("cuts", "capacity_factor"), [((0, 4, 8, 12), 0.5), ((0, 1, 12, 12), None), ((0, 0, 0, 0), None)]
)
@pytest.mark.parametrize("router", ["linear", "soft", {"name": "linear", "selection": "top_p"}])
def test_parts_add_up_to_the_whole(router, cuts, capacity_factor):
    torch.manual_seed(0)
    config = MoEConfig(model_dim=D, hidden_dim=4, num_experts=E, router=router)
    layer, x = MoE(config).double(), torch.randn(cuts[-1], 2, D).double() + 1
    mask = torch.rand(cuts[-1], 2) > 0.3
    limit = {} if router == "soft" else {"capacity_factor": capacity_factor}
    groups = 1 if capacity_factor is None else 3
    whole = stats_of(layer, x, mask=mask, num_groups=groups, sequence_length=2, **limit)
    parts = [
        stats_of(layer, x[first:end], mask=mask[first:end], sequence_length=2, **limit)
        for first, end in itertools.pairwise(cuts)
    ]
    merged = merge_stats(parts)
    reduced = run_ranks(3, lambda rank, all_reduce: reduce_stats({0: parts[rank]}, all_reduce)[0])
    assert groups == 1 or router == "soft" or whole.dropped > 0
    for got in (merged, *reduced):
        assert vars(got).keys() == vars(whole).keys()
        for name, value in vars(whole).items():
            assert_close(getattr(got, name), value, name=name)
            assert not getattr(got, name).requires_grad


def test_one_reduction_for_all_layers():
    layers = [MoE(MoEConfig(model_dim=D, hidden_dim=4, num_experts=n)) for n in (3, 5)]
    x, calls = torch.randn(6, D), []

    def work(rank, all_reduce):
        def counting(value):
            calls.append(rank)
            return all_reduce(value)

        part = x[rank * 2 : 6 if rank else 2]
        return reduce_stats({i: stats_of(layer, part) for i, layer in enumerate(layers)}, counting)

    for reduced in run_ranks(2, work):
        for i, layer in enumerate(layers):
            assert torch.equal(reduced[i].load_E, stats_of(layer, x).load_E)
    assert sorted(calls) == [0, 1]
    assert reduce_stats({}, None) == {}
