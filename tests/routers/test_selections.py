"""Selection rules against their definitions in plain Python."""

from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert import ConfigError, InputError, MoE, MoEConfig, RoutingContext
from flexpert.routers.selections import (
    SELECTIONS,
    Balanced,
    GroupLimited,
    Random,
    Threshold,
    TopK,
    TopP,
)

NOBODY = float("-inf")


def rankings(tokens, num_experts, seed=0, forbid=0.0):
    """Gate scores that sum to 1, some of them ruled out; fp64, so that sums are those of the loops."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 2 * torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)
    forbidden_TE = torch.rand(tokens, num_experts, generator=generator) < forbid
    return logits_TE.softmax(-1).masked_fill(forbidden_TE, NOBODY)


def key():
    return torch.tensor(17)


def select(rule, ranking_TE, top_k=1, **facts):
    """The experts of each token in order, without those that stand for none."""
    ids_TK = rule(ranking_TE, top_k, RoutingContext(**facts), key)
    num_experts = ranking_TE.shape[1]
    assert ids_TK.dtype == torch.int64
    assert (ids_TK >= 0).all()
    rows = [[e for e in row if e < num_experts] for row in ids_TK.tolist()]
    return [[e for e in row if ranking_TE[t, e] > NOBODY] for t, row in enumerate(rows)]


def order_of(row):
    return sorted(range(len(row)), key=lambda e: -row[e])


shapes = given(
    tokens=st.integers(0, 12), num_experts=st.integers(1, 9), seed=st.integers(0, 99), data=st.data()
)


@settings(max_examples=50)
@shapes
def test_top_k(tokens, num_experts, seed, data):
    ranking_TE = rankings(tokens, num_experts, seed)
    top_k = data.draw(st.integers(1, num_experts))
    assert select(TopK(), ranking_TE, top_k) == [order_of(row)[:top_k] for row in ranking_TE.tolist()]
    ranks = tuple(data.draw(st.permutations(range(num_experts)))[:top_k])
    want = [[order_of(row)[i] for i in ranks] for row in ranking_TE.tolist()]
    assert select(TopK(), ranking_TE, ranks=ranks) == want


@pytest.mark.parametrize("ranks", [(), (0, 0), (-1,), (3,), (0, 7)])
def test_ranks_that_are_none(ranks):
    with pytest.raises(InputError, match=r"ranks=.*expected different positions in 0\.\.2"):
        select(TopK(), rankings(4, 3), ranks=ranks)


@pytest.mark.parametrize("rule", [TopP(), Threshold(threshold=0.1), Balanced()])
def test_rules_without_ranks_refuse_them(rule):
    with pytest.raises(InputError, match=r"ranks=\(0, 1\): selection '.*' has no use for it"):
        select(rule, rankings(4, 3), ranks=(0, 1))


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 12),
    num_experts=st.integers(1, 9),
    seed=st.integers(0, 99),
    p=st.sampled_from([0.0, 0.2, 0.4, 0.9, 1.0]),
    max_k=st.sampled_from([None, 1, 3, 20]),
)
def test_top_p(tokens, num_experts, seed, p, max_k):
    ranking_TE = rankings(tokens, num_experts, seed)
    want = []
    for row in ranking_TE.tolist():
        taken, mass = [], 0.0
        for e in order_of(row):
            if taken and mass > p:
                break
            taken.append(e)
            mass += row[e]
        want.append(taken[:max_k])
    assert select(TopP(p=p, max_k=max_k), ranking_TE) == want


def test_top_p_keeps_the_expert_that_crosses_p():
    ranking_TE = torch.tensor([[0.5, 0.25, 0.125, 0.125]])  # whose sums are exact
    sizes = [len(select(TopP(p=p), ranking_TE)[0]) for p in (0.0, 0.49, 0.5, 0.75, 0.8, 0.875, 1.0)]
    assert sizes == [1, 1, 2, 3, 3, 4, 4]


def test_top_p_grows_with_p_and_takes_one_where_one_suffices():
    ranking_TE = rankings(200, 8)
    before = [0] * 200
    for p in (0.0, 0.2, 0.4, 0.9, 1.0):
        counts = [len(ids) for ids in select(TopP(p=p), ranking_TE)]
        assert all(a <= b for a, b in zip(before, counts, strict=True))
        assert all(k == 1 for k, best in zip(counts, ranking_TE.amax(1), strict=True) if best > p)
        before = counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_of_everything_loses_nobody_to_rounding(dtype):
    logits_TE = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 8
    assert all(len(ids) == 64 for ids in select(TopP(p=1.0), logits_TE.to(dtype).softmax(-1)))


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 12),
    num_experts=st.integers(1, 9),
    seed=st.integers(0, 99),
    threshold=st.sampled_from([-1.0, 0.0, 0.1, 0.3, 2.0]),
    min_k=st.integers(0, 10),
)
def test_threshold(tokens, num_experts, seed, threshold, min_k):
    ranking_TE = rankings(tokens, num_experts, seed)
    want = [
        [e for place, e in enumerate(order_of(row)) if row[e] > threshold or place < min_k]
        for row in ranking_TE.tolist()
    ]
    assert select(Threshold(threshold=threshold, min_k=min_k), ranking_TE) == want


@settings(max_examples=80)
@given(
    tokens=st.integers(0, 12),
    groups=st.integers(1, 4),
    size=st.integers(1, 4),
    group_top=st.integers(1, 3),
    forbid=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_group_limited(tokens, groups, size, group_top, forbid, seed, data):
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, kept * size))
    ranking_TE = rankings(tokens, groups * size, seed, forbid)
    want = []
    for row in ranking_TE.tolist():
        members = {g: [e for e in range(g * size, (g + 1) * size) if row[e] > NOBODY] for g in range(groups)}
        totals = {
            g: sum(sorted((row[e] for e in ids), reverse=True)[:group_top])
            for g, ids in members.items()
            if ids
        }
        best = sorted(totals, key=lambda g: -totals[g])[:kept]
        open_to_it = [e for g in best for e in members[g]]
        want.append(sorted(open_to_it, key=lambda e: -row[e])[:top_k])
    rule = GroupLimited(groups=groups, groups_kept=kept, group_top=group_top)
    assert select(rule, ranking_TE, top_k) == want


def test_group_limited_refuses_what_its_groups_do_not_hold():
    rule = GroupLimited(groups=4, groups_kept=1)
    with pytest.raises(InputError, match="top_k=3 exceeds the 2 experts of groups_kept=1"):
        select(rule, rankings(3, 8), 3)
    with pytest.raises(InputError, match="top_k=3 exceeds the 2 experts"):
        select(rule, rankings(3, 8), 1, ranks=(2,))
    with pytest.raises(ConfigError, match="groups=4 does not divide num_experts=6"):
        rule.check(6, 1, ConfigError)


def test_random_is_uniform_over_sets_of_different_experts():
    tokens, num_experts, top_k = 20_000, 5, 2
    chosen = select(Random(), torch.zeros(tokens, num_experts), top_k)
    assert all(len(set(ids)) == top_k for ids in chosen)
    pairs = collections.Counter(tuple(ids) for ids in chosen)
    assert len(pairs) == num_experts * (num_experts - 1)
    expected = tokens / len(pairs)
    chi_square = sum((n - expected) ** 2 / expected for n in pairs.values())
    assert chi_square < 19 + 5 * (2 * 19) ** 0.5


def test_random_passes_over_those_ruled_out():
    ranking_TE = rankings(300, 6, forbid=0.5)
    chosen = select(Random(), ranking_TE, 3)
    for ids, row in zip(chosen, ranking_TE, strict=True):
        assert len(ids) == min(3, int((row > NOBODY).sum()))


@settings(max_examples=30)
@shapes
def test_balanced(tokens, num_experts, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    chosen = select(Balanced(), rankings(tokens, num_experts, seed), top_k)
    assert all(len(set(ids)) == top_k for ids in chosen)
    loads = collections.Counter(e for ids in chosen for e in ids)
    loads = [loads[e] for e in range(num_experts)]
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("name", SELECTIONS)
def test_nan_stays_in_its_token(name):
    options = {"threshold": {"threshold": 0.1}, "group_limited": {"groups": 3, "groups_kept": 2}}
    rule = SELECTIONS[name](**options.get(name, {}))
    ranking_TE = rankings(5, 6)
    whole = select(rule, ranking_TE, 2)
    ranking_TE[2] = float("nan")
    ids_TK = rule(ranking_TE, 2, RoutingContext(), key)
    assert ((ids_TK >= 0) & (ids_TK <= 6)).all()
    broken = select(rule, ranking_TE, 2)
    assert broken[:2] + broken[3:] == whole[:2] + whole[3:]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("topk", "unknown selection 'topk': did you mean 'top_k'"),
        ({"name": "top_p", "q": 1}, "selection 'top_p': unknown option 'q'; .*max_k, p"),
        ({"name": "top_p", "p": -0.1}, "p=-0.1: expected a finite number >= 0"),
        ({"name": "top_p", "p": "4e-1"}, "p='4e-1': expected a finite number"),
        ({"name": "top_p", "max_k": 0}, "max_k=0: expected an integer >= 1"),
        ({"name": "threshold"}, "selection 'threshold': .*'threshold'"),
        ({"name": "threshold", "threshold": float("nan")}, "threshold=nan: expected a finite number"),
        ({"name": "threshold", "threshold": 0.5, "min_k": -1}, "min_k=-1: expected an integer >= 0"),
        ({"name": "group_limited", "groups": 3, "groups_kept": 1}, "groups=3 does not divide num_experts=4"),
        ({"name": "group_limited", "groups": 2, "groups_kept": 3}, "groups_kept=3 exceeds groups=2"),
        ({"name": "group_limited", "groups": 4, "groups_kept": 1}, "top_k=2 exceeds the 1 experts"),
        (
            {"name": "group_limited", "groups": 2, "groups_kept": 1, "group_top": 0},
            "group_top=0: expected an int",
        ),
        (7, "selection=7: expected a name or a dict"),
    ],
)
def test_bad_options(selection, message):
    config = MoEConfig(
        model_dim=4, hidden_dim=4, num_experts=4, top_k=2, router={"name": "linear", "selection": selection}
    )
    with pytest.raises(ConfigError, match=message):
        config.build()


@pytest.mark.parametrize("name", ["top_p", "threshold"])
def test_a_varying_number_of_experts_reaches_the_statistics(name):
    selection = (
        {"name": "threshold", "threshold": 0.3} if name == "threshold" else {"name": "top_p", "p": 0.5}
    )
    torch.manual_seed(0)
    layer = MoE(
        MoEConfig(model_dim=4, hidden_dim=4, num_experts=4, router={"name": "linear", "selection": selection})
    )
    x = torch.randn(50, 4)
    _, info = layer(x, return_info=True)
    per_token = torch.bincount(info.routing.unit_N, minlength=50)
    assert per_token.min() >= 1
    assert len(per_token.unique()) > 1
    assert info.stats.load_E.sum() == per_token.sum() == len(info.routing.unit_N)
