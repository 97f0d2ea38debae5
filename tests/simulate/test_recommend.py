"""The recommended plan is the fastest that fits, by the simulator's figures; what does not fit is refused."""

from __future__ import annotations

import dataclasses

import pytest

from flexpert.core.errors import ConfigError
from flexpert.simulate import Cluster, Unlike, recommend, simulate
from flexpert.simulate.models import parse_model
from flexpert.simulate.plan_map import HIDDEN, TOKENS, best_plans
from flexpert.simulate.scaling_curve import throughput

MODEL = parse_model(
    "language:layers=2,model_dim=512,heads=8,hidden_dim=2048,vocabulary=1000,length=512,num_experts=8"
)
CLUSTER = Cluster.parse("a100-ndv4:nodes=2,devices=4")


@pytest.fixture(scope="module")
def found():
    return recommend(MODEL, CLUSTER, 32)


def test_plans_are_ranked_by_time_and_fit(found):
    times = [choice.step.seconds for choice in found.ranked]
    assert times == sorted(times)
    assert all(choice.step.total_memory <= found.budget for choice in found.ranked)
    assert len({choice.plan for choice in found.ranked}) == len(found.ranked)
    assert found.considered == len(found.ranked) + len(found.refused)


def test_a_plan_takes_what_the_simulator_says(found):
    for choice in (found.ranked[0], found.ranked[-1]):
        assert simulate(MODEL, CLUSTER, 32, choice.plan).seconds == choice.step.seconds


def test_it_tries_every_kind_of_choice(found):
    plans = [choice.plan for choice in found.ranked]
    assert {plan.replicas for plan in plans} >= {1, 2}
    assert {plan.dense_shards for plan in plans} >= {1, 4, 8}
    executions = [plan.execution for plan in plans]
    assert {plan.r for plan in executions} >= {0, 1}
    assert {plan.degree for plan in executions} == {1, 2, 4, 8}
    assert {plan.capacity for plan in executions} == {"ragged", "padded"}


def test_what_would_change_the_answer(found):
    names = {
        "bandwidth between nodes x 2",
        "bandwidth between nodes / 2",
        "batch x 2",
        "memory of a device / 2",
    }
    assert set(found.sensitivity) == names
    faster, slower = (found.sensitivity[f"bandwidth between nodes {way} 2"]["speed"] for way in ("x", "/"))
    assert faster >= 1 >= slower
    limited = dataclasses.replace(MODEL.with_experts(capacity_factor=1.25), name="limited")
    assert "capacity factor x 2" in recommend(limited, CLUSTER, 32).sensitivity


def test_less_memory_takes_smaller_passes_and_then_nothing(found):
    needed = found.best.step.total_memory

    def on(share):
        where = CLUSTER.with_machine(memory=int(needed / 0.9 * share))
        return recommend(MODEL, where, 32, sensitivity=False)

    tight = on(0.6)
    assert tight.best.step.seconds > found.best.step.seconds
    assert tight.best.step.total_memory <= tight.budget < needed
    assert tight.refused
    with pytest.raises(ConfigError, match=r"does not fit 8 ranks of .* GiB .* needs least, .* GiB"):
        on(0.02)


def test_the_smallest_device_must_hold_a_plan(found):
    share = 0.6 * found.best.step.total_memory / CLUSTER.machine.memory
    small = dataclasses.replace(CLUSTER, unlike=(Unlike(rank=3, memory=share),))
    tight = recommend(MODEL, small, 32, sensitivity=False)
    assert tight.budget == int(0.9 * int(0.6 * found.best.step.total_memory))
    assert all(choice.step.total_memory <= tight.budget for choice in tight.ranked)
    assert len(tight.refused) > len(found.refused)
    step = simulate(MODEL, small, 32, found.best.plan)
    assert step.seconds == found.best.step.seconds
    assert not step.fits


def test_a_dense_model_has_plans():
    dense = parse_model("language:layers=1,model_dim=256,heads=4,hidden_dim=512,vocabulary=100,num_experts=0")
    assert recommend(dense, CLUSTER, 8, sensitivity=False).best.step.seconds > 0


def test_experts_that_divide_no_ranks_are_copied_to_each():
    odd = Cluster.parse("a100-ndv4:nodes=3,devices=5")
    found = recommend(parse_model("layer:num_experts=7"), odd, 15, sensitivity=False)
    assert {choice.plan.replicas for choice in found.ranked} == {15}


def test_the_map_moves_from_tokens_to_parameters():
    """With many tokens and small experts parameters travel, with few tokens and large experts rows do."""
    table = best_plans(Cluster.parse("a100-ndv4:nodes=2,devices=4"))
    assert (len(table), len(table[0])) == (len(HIDDEN), len(TOKENS))
    legal = ["r=0", *(f"r={r}" for r in (1, 2, 4))]
    few_tokens, many_tokens = table[-1][0].split()[0], table[0][-1].split()[0]
    assert legal.index(many_tokens) < legal.index(few_tokens)


def test_scaling_counts_the_samples_of_the_best_plan_of_each_size():
    model = parse_model("layer:num_experts=6,model_dim=64,hidden_dim=64")
    cluster = Cluster.parse("a100-ndv4:nodes=3,devices=1")
    rates = throughput(model, cluster, 96)
    assert list(rates) == [1, 2, 3]
    best = recommend(model, cluster, 96, sensitivity=False).best
    assert rates[3] == pytest.approx(96 / best.step.seconds)
    assert list(throughput(model, cluster, 7)) == [1, 2]  # seven tokens are not for three ranks
    small = dataclasses.replace(cluster, machine=dataclasses.replace(cluster.machine, memory=2**16))
    assert throughput(model, small, 96) == {}
