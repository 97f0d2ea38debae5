"""Predicted costs against closed forms, bounds and live counters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.core.errors import ConfigError
from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize
from flexpert.testing import run_ranks
from flexpert.tune import LayerShape, Rate, Workload, candidates, predict
from flexpert.tune.memory import memory_of
from flexpert.tune.pipeline import pipeline
from tests.parallel.cases import make_layer, tokens_of
from tests.tune.cases import machine_of, shape_of

COMMUNICATION = {"counts", "gather", "scatter", "average", "dispatch", "combine"}


def test_one_rank_communicates_nothing():
    shape = shape_of(expert_ranks=1, ranks_per_node=1)
    cost = predict(shape, ExecutionPlan(), Workload.uniform(shape, 64), machine_of())
    assert sum(cost.parts.get(name, 0.0) for name in COMMUNICATION) == 0
    assert (cost.bytes_inside, cost.bytes_between) == (0, 0)
    # 16 rows of each of 4 experts, 512 operations each, backward twice as many; calls of a millisecond.
    rate = machine_of().rate("float32")
    products = 4 * (rate.seconds(16, 512) + rate.seconds(16, 1024, backward=True))
    assert cost.seconds == pytest.approx(2e-3 + products)


def test_linear_exchange_in_closed_form():
    """Two nodes of one rank: half of the rows cross, on a wire that messages do not slow."""
    free = machine_of(rates={"float32": Rate(rows=(1,), forward=(1e30,), backward=(1e30,))})
    free = dataclasses.replace(
        free,
        overheads=type(free.overheads)(),
        between=dataclasses.replace(free.between, per_message=0.0),
    )
    shape = shape_of(num_experts=2, expert_ranks=2, ranks_per_node=1, verify=False)
    cost = predict(
        shape,
        ExecutionPlan(capacity="padded"),
        Workload.uniform(shape, 100, capacity=50),
        free,
        backward=False,
    )
    one_way = 1e-4 + 50 * 8 * 4 / 1e7
    assert cost.parts["dispatch"] == pytest.approx(one_way)
    assert cost.seconds == pytest.approx(2 * one_way)
    assert cost.bytes_between == 2 * 50 * 8 * 4


def count(mesh_options, plans, skewed):
    mesh = expert_mesh(4, ranks_per_node=2, **mesh_options)
    layer = make_layer(dtype=torch.float32)
    parallelize(layer, mesh)
    x = tokens_of([6, 2, 4, 5], torch.float32)[0].split([6, 2, 4, 5])[dist.get_rank()].requires_grad_()
    shape, found = LayerShape.of(mesh, layer.experts), []
    for plan in plans:
        mesh.traffic.reset()
        y, info = layer(x, plan=ExecutionPlan(**plan), return_info=True)
        y.sum().backward()
        sent = torch.tensor([mesh.traffic.inside, mesh.traffic.between])
        table = torch.empty(4, 2, dtype=torch.int64)
        mesh.everyone.all_gather(table.view(-1), sent)
        rows_PE = torch.empty(mesh.whole.size, 4, dtype=torch.int64)
        mesh.whole.all_gather(rows_PE.view(-1), info.routing.counts_E)
        cost = predict(shape, ExecutionPlan(**plan), Workload(rows_PE=rows_PE, tokens=6), machine_of())
        most = table[table.sum(1).argmax()].tolist()
        found.append((plan, most, [cost.bytes_inside, cost.bytes_between]))
    return found


@pytest.mark.parametrize("mesh", [{}, {"slices": 2}], ids=str)
def test_bytes_are_those_of_the_counters(mesh):
    plans = [{"r": 0}, {"r": 1, "algorithm": "2dh"}, {"r": 1, "degree": 3, "capacity": "padded"}]
    plans += [{"r": 2}] if mesh else []
    for plan, measured, predicted in run_ranks(count, 4, mesh, plans, True)[0]:
        assert sum(measured) > 0
        assert measured == predicted, plan


@pytest.mark.parametrize(
    "plan", [{"r": 0}, {"r": 1}, {"r": 2, "degree": 4}, {"r": 1, "algorithm": "2dh"}], ids=str
)
def test_slower_links_and_more_rows_cost_more(plan):
    shape, plan = shape_of(slices=2), ExecutionPlan(**plan)
    work, machine = Workload.zipf(shape, 4096, skew=1.0), machine_of()
    base = predict(shape, plan, work, machine).seconds
    between = machine.between
    for change in (
        {"bandwidth": between.bandwidth / 2},
        {"latency": between.latency * 10, "step": between.step * 10},
    ):
        slow = dataclasses.replace(machine, between=dataclasses.replace(between, **change))
        assert predict(shape, plan, work, slow).seconds > base
    more = Workload(rows_PE=work.rows_PE * 2, tokens=work.tokens)
    assert predict(shape, plan, more, machine).seconds > base
    assert predict(shape, plan, work, machine, backward=False).seconds < base
    assert predict(shape, plan, work, machine, optimizer=True).seconds > base
    shared = dataclasses.replace(machine, processors=2, sharing=8)
    assert predict(shape, plan, work, shared).seconds > base


def test_the_fullest_rank_counts():
    shape, machine = shape_of(), machine_of()
    even = Workload(rows_PE=torch.full((4, 4), 100), tokens=400)
    skewed = Workload(rows_PE=torch.tensor([[370, 10, 10, 10]] * 4), tokens=400)
    parts = [predict(shape, ExecutionPlan(), work, machine).parts for work in (even, skewed)]
    assert parts[1]["experts"] > 3 * parts[0]["experts"]
    # Ranks that share two processors finish together what one of them has more of.
    shared = dataclasses.replace(machine, processors=1, sharing=4)
    parts = [predict(shape, ExecutionPlan(), work, shared).parts for work in (even, skewed)]
    assert parts[1]["experts"] < 1.2 * parts[0]["experts"]


@settings(deadline=None, max_examples=50)
@given(
    dispatch=st.floats(0, 10),
    experts=st.floats(0, 10),
    combine=st.floats(0, 10),
    degree=st.integers(1, 8),
    overlap=st.floats(0, 1),
)
def test_a_pipeline_takes_no_less_than_its_longest_part(dispatch, experts, combine, degree, overlap):
    took = pipeline(dispatch, experts, combine, degree, overlap)
    slack = 1e-9
    assert max(dispatch + combine, experts) - slack <= took <= dispatch + experts + combine + slack
    assert took <= pipeline(dispatch, experts, combine, degree, 0.0) + slack


def test_a_pipeline_in_closed_form():
    # Equal phases in two chunks: 0.5 there, then 0.5 of computing while the rest arrives, twice back.
    assert pipeline(1, 1, 1, 2) == pytest.approx(2.0)
    assert pipeline(1, 1, 1, 1) == 3
    assert pipeline(1, 0, 1, 4) == 2
    assert pipeline(0, 1, 0, 4) == 1


def test_candidates_are_what_the_mesh_allows():
    shape = shape_of(slices=4)
    plans = candidates(shape)
    assert {plan.r for plan in plans} == {0, 1, 2, 4}
    assert {plan.degree for plan in plans} == {1, 2, 4, 8}
    assert {plan.algorithm for plan in plans} == {"linear", "2dh"}
    assert len(set(plans)) == len(plans) == 1 + 3 * 4 * 2 * 2
    work = Workload.uniform(shape, 32)
    assert all(predict(shape, plan, work, machine_of()).seconds > 0 for plan in plans)
    for nodes in (1, 16):  # all ranks on one node, or each on its own
        flat = candidates(shape_of(slices=4, ranks_per_node=nodes))
        assert {plan.algorithm for plan in flat} == {"linear"}


@pytest.mark.parametrize(
    ("options", "plan", "named"),
    [
        ({"slices": 4}, {"r": 3}, "r=3"),
        ({}, {"r": 2}, "r=2"),
        ({"ranks_per_node": 3}, {"algorithm": "2dh"}, "algorithm='2dh'"),
    ],
)
def test_illegal_plans_are_refused(options, plan, named):
    shape = shape_of(**options)
    with pytest.raises(ConfigError, match=named):
        predict(shape, ExecutionPlan(**plan), Workload.uniform(shape, 8), machine_of())


@pytest.mark.parametrize(("degree", "algorithm"), [(1, "linear"), (4, "linear"), (1, "2dh"), (4, "2dh")])
def test_hundreds_of_equal_ranks(degree, algorithm):
    """Forward and backward, there and back: all rows but those for the rank's own node."""
    shape = shape_of(num_experts=512, expert_ranks=512, ranks_per_node=8, verify=False)
    work = Workload.uniform(shape, 512 * 8, capacity=8)
    plan = ExecutionPlan(degree=degree, algorithm=algorithm, capacity="padded")
    cost = predict(shape, plan, work, machine_of())
    assert cost.bytes_between == 4 * 8 * (512 - 8) * 8 * 4
    # By way of the node's ranks more bytes stay inside: those for other nodes, too, go to seven of eight.
    inside = 512 // 8 * 7 if algorithm == "2dh" else 7
    assert cost.bytes_inside == 4 * 8 * inside * 8 * 4


def test_memory_in_closed_form():
    """One rank and one expert: every tensor that lives at the peak, by hand."""
    shape = shape_of(num_experts=1, expert_ranks=1, ranks_per_node=1)
    parts = memory_of(shape, ExecutionPlan(), Workload.uniform(shape, 100))
    weights = 4 * 2 * 8 * 16
    assert parts["parameters"] == parts["gradients"] == weights
    assert parts["optimizer"] == 2 * weights
    assert parts["gathered"] == 0
    # x, y and its gradient; rows, results and the hidden layer.
    assert parts["activations"] == 4 * 100 * (8 + 2 * 8 + 8 + 8 + 16)
    assert sum(memory_of(shape, ExecutionPlan(), Workload.uniform(shape, 100), optimizer=False).values()) == (
        sum(parts.values()) - 2 * weights
    )


def test_memory_grows_with_rows_and_shrinks_with_slices():
    shape = shape_of(slices=2, hidden_dim=4096, model_dim=64, output_dim=64)
    few, many = (Workload.uniform(shape, n) for n in (64, 4096))
    total = {
        (r, n): sum(memory_of(shape, ExecutionPlan(r=r), work).values())
        for r in (0, 1, 2)
        for n, work in ((64, few), (4096, many))
    }
    assert all(total[r, 64] < total[r, 4096] for r in (0, 1, 2))
    assert total[2, 64] < total[1, 64] < total[0, 64]  # fewer parameters gathered
