"""Simulated steps against closed forms, and how they must change with what they are made of."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.simulate import Cluster, JobPlan, parse_traffic, simulate
from flexpert.simulate.clocks import WAIT, Clocks, Stage, latest
from flexpert.simulate.models import parse_model
from flexpert.simulate.step import memory_needed
from flexpert.tune import Link, Machine, Rate
from flexpert.tune.machine import Overheads

PLAIN = Machine(
    name="plain",
    inside=Link(latency=0.0, bandwidth=100e9),
    between=Link(latency=0.0, bandwidth=4e9),
    rates={"float32": Rate(rows=(1,), forward=(1e12,), backward=(1e12,))},
    memory_bandwidth=1e12,
    overheads=Overheads(),
)


def cluster(nodes=2, devices=2, machine=PLAIN, unlike=()):
    return Cluster(name="test", nodes=nodes, devices=devices, machine=machine, unlike=unlike)


def layer(experts=4, **settings):
    given = {"model_dim": 64, "hidden_dim": 128, "num_experts": experts, "top_k": 1, "capacity_factor": 1.0}
    return parse_model("layer:" + ",".join(f"{key}={value}" for key, value in {**given, **settings}.items()))


TOKENS = 4 * 1024


def test_a_layer_without_overlap_is_the_sum_of_its_parts():
    """Four ranks on two nodes, one expert each: products, and three quarters of the rows travel."""
    step = simulate(layer(), cluster(), TOKENS, JobPlan.parse("capacity=padded"))
    rows, row = 1024, 64 * 4
    assert step.parts["experts"] == pytest.approx(3 * rows * 2 * 2 * 64 * 128 / 1e12)
    # Half of a rank's rows go to the other node, whose link two ranks share; a quarter stays inside.
    one_way = max(rows // 2 * row * 2 / 4e9, rows // 4 * row / 100e9)
    assert step.parts["dispatch"] == pytest.approx(2 * one_way)
    assert step.parts["combine"] == pytest.approx(2 * one_way)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert step.bottleneck == "dispatch"


def test_the_hierarchical_exchange_has_two_stages():
    """Inside the node half of all rows change places, then half of them go to the other node."""
    plan = JobPlan.parse("algorithm=2dh,capacity=padded")
    step = simulate(layer(), cluster(), TOKENS, plan)
    size, copied = 1024 * 64 * 4, 2 / 1e12
    inner, outer = size // 2, size // 2
    sent = inner + outer  # by the cost model's count, of both stages
    stages = inner / 100e9 + outer * 2 / 4e9 + 2 * sent * copied
    assert step.parts["dispatch"] == pytest.approx(2 * stages)


def test_messages_cost_where_bytes_do_not():
    machine = dataclasses.replace(PLAIN, between=Link(latency=1e-3, bandwidth=1e15, per_message=1e-2))
    step = simulate(layer(), cluster(machine=machine), TOKENS, JobPlan.parse("capacity=padded"))
    assert step.parts["dispatch"] == pytest.approx(2 * (1e-3 + 2 * 1e-2), rel=1e-3)


def test_messages_take_shared_processors_and_cut_rows_are_picked():
    """Two chunks, two ranks to a processor: four exchanges each way are sent, and each rank's rows picked."""
    link = dataclasses.replace(PLAIN.between, per_message=1e-4)
    own = dataclasses.replace(PLAIN, between=link, overheads=Overheads(cut=1e-9, cut_backward=2e-9))
    shared = dataclasses.replace(own, processors=2, sharing=4)
    plan = JobPlan.parse("degree=2,capacity=padded")
    parts = simulate(layer(), cluster(machine=own), TOKENS, plan).parts
    assert "messages" not in parts
    assert parts["encode"] + parts["decode"] == pytest.approx(1024 * 64 * 4 * 3e-9)
    step = simulate(layer(), cluster(machine=shared), TOKENS, plan)
    assert step.parts["messages"] == pytest.approx(8 * 2 * 2e-4)  # two messages, to the other node's ranks
    assert sum(step.parts.values()) == pytest.approx(step.seconds)


def test_r_zero_gathers_parameters_and_sends_no_row():
    step = simulate(layer(), cluster(), TOKENS, JobPlan.parse("r=0"))
    assert "dispatch" not in step.parts
    size = 2 * 4 * 64 * 128 * 4  # both matrices of four experts, three quarters of them from others
    assert step.parts["gather"] == pytest.approx(3 / 4 * size / 4e9)
    assert step.parts["experts"] == pytest.approx(3 * 1024 * 2 * 2 * 64 * 128 / 1e12)


def test_overlap_hides_the_shorter_of_two():
    slow = dataclasses.replace(PLAIN, between=Link(latency=0.0, bandwidth=1e9))
    serial, overlapped = (
        simulate(layer(), cluster(machine=slow), TOKENS, JobPlan.parse(f"degree={d},capacity=padded"))
        for d in (1, 8)
    )
    sent = serial.parts["dispatch"] + serial.parts["combine"]
    assert serial.seconds > overlapped.seconds > sent
    hidden = serial.parts["experts"]
    assert overlapped.seconds == pytest.approx(serial.seconds - hidden)


def test_imperfect_overlap_slows_products_while_rows_travel():
    disturbed = dataclasses.replace(PLAIN, overlap=0.0)
    times = [
        simulate(layer(), cluster(machine=machine), TOKENS, JobPlan.parse("degree=2")).seconds
        for machine in (PLAIN, disturbed)
    ]
    assert times[1] > times[0]


def test_all_reduce_of_dense_gradients_is_a_ring():
    model = parse_model("layer:num_experts=4,top_k=1")
    step = simulate(model, cluster(), 4)
    size = 4 * 1024 * 4  # the router's weight, of which two ranks of a node send each other's half on
    assert step.parts["dense reduce"] == pytest.approx(2 * 3 / 4 * size / 4e9, rel=0.01)


@pytest.mark.parametrize(
    "text", ["", "degree=4", "algorithm=2dh,degree=2", "r=0", "r=2", "checkpointing=true"]
)
def test_parts_add_up_on_the_critical_path_and_on_every_rank(text):
    model = layer(experts=2) if "r=2" in text else layer(experts=8)
    uneven = cluster(unlike=Cluster.parse("a100-ndv4:nodes=2,slow_node=1@0.7").unlike)
    step = simulate(model, uneven, TOKENS, JobPlan.parse(text), traffic=parse_traffic("zipf"), watch=[0, 3])
    assert sum(step.parts.values()) == pytest.approx(step.seconds, rel=1e-9)
    total_W = torch.stack(list(step.parts_W.values())).sum(0)
    assert torch.allclose(total_W, torch.full_like(total_W, step.seconds), rtol=1e-9)
    assert WAIT not in step.parts


def test_the_timeline_is_the_step():
    """Without overlap a rank's events and its waiting fill the step."""
    step = simulate(layer(), cluster(), TOKENS, traffic=parse_traffic("zipf"), watch=[0, 2])
    for rank in (0, 2):
        timeline = step.timelines[rank]
        ends = max(event.end for event in timeline.events)
        late = float(step.parts_W[WAIT][rank])
        busy = timeline.seconds("compute") + timeline.seconds("communication") - timeline.overlap_seconds()
        assert ends <= step.seconds * (1 + 1e-9)
        assert busy == pytest.approx(step.seconds, rel=0.01) or busy + late >= step.seconds
        assert timeline.seconds("compute") == pytest.approx(
            sum(
                float(value_W[rank])
                for name, value_W in step.parts_W.items()
                if name in ("dense", "experts", "optimizer")
            )
        )


def test_the_same_seed_gives_the_same_step():
    def run(seed):
        traffic = parse_traffic(f"zipf:skew=1,seed={seed}")
        return simulate(layer(), cluster(), TOKENS, traffic=traffic).to_dict()

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_slow_rank_moves_the_bottleneck_to_what_it_does():
    plan = JobPlan.parse("capacity=padded")
    usual = simulate(layer(), cluster(), TOKENS, plan)
    slow = Cluster.parse("a100-ndv4:nodes=2,slow_rank=3@0.02").unlike
    limping = simulate(layer(), cluster(unlike=slow), TOKENS, plan)
    assert usual.bottleneck == "dispatch"
    assert not usual.straggler
    assert limping.bottleneck == "experts"
    assert limping.straggler
    assert limping.rank == 3
    assert limping.waiting > 0.5


def test_a_slow_link_is_felt_by_all():
    slow = Cluster.parse("a100-ndv4:nodes=2,slow_link=1@0.25").unlike
    plan = JobPlan.parse("capacity=padded")
    usual, limping = (simulate(layer(), c, TOKENS, plan) for c in (cluster(), cluster(unlike=slow)))
    assert limping.parts["dispatch"] == pytest.approx(4 * usual.parts["dispatch"])


@pytest.mark.parametrize("change", ["tokens", "bandwidth", "flops", "skew"])
def test_more_work_or_less_speed_never_takes_less_time(change):
    def seconds(n):
        machine, traffic, tokens = PLAIN, "uniform", TOKENS
        if change == "tokens":
            tokens = TOKENS * 2**n
        elif change == "bandwidth":
            machine = dataclasses.replace(PLAIN, between=Link(latency=0.0, bandwidth=4e9 / 2**n))
        elif change == "flops":
            rate = Rate(rows=(1,), forward=(1e12 / 2**n,), backward=(1e12 / 2**n,))
            machine = dataclasses.replace(PLAIN, rates={"float32": rate})
        else:
            traffic = f"zipf:skew={n}"
        model = layer(capacity_factor="null" if change == "skew" else 1.0)
        return simulate(model, cluster(machine=machine), tokens, traffic=parse_traffic(traffic)).seconds

    times = [seconds(n) for n in range(4)]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_micro_batches_and_checkpointing_trade_time_for_memory():
    model = parse_model("language:layers=4,model_dim=256,heads=4,hidden_dim=512,vocabulary=1000,length=128")
    where = Cluster.parse("a100-ndv4:nodes=1")
    steps = [
        simulate(model, where, 64, JobPlan.parse(text))
        for text in ("r=1", "micro_batch=2", "checkpointing=true", "micro_batch=2,checkpointing=true")
    ]
    memory = [step.total_memory for step in steps]
    assert memory[0] > memory[1] > memory[3]
    assert memory[0] > memory[2]
    assert steps[0].seconds < steps[1].seconds < steps[3].seconds
    assert steps[0].seconds < steps[2].seconds


def test_dense_shards_divide_what_is_kept():
    model = parse_model("language:layers=4,model_dim=256,heads=4,hidden_dim=512,vocabulary=1000,length=128")
    where = Cluster.parse("a100-ndv4:nodes=2")
    parts = {n: memory_needed(model, where, 16, JobPlan.parse(f"dense_shards={n}")) for n in (1, 8, 16)}
    assert parts[1]["dense parameters"] == 4 * model.dense_params
    assert parts[8]["dense parameters"] == -(-model.dense_params // 8) * 4
    assert parts[16]["dense optimizer"] == 2 * parts[16]["dense gradients"]
    step = simulate(model, where, 16, JobPlan.parse("dense_shards=16"))
    assert step.memory == parts[16]
    assert step.parts["dense gather"] > 0


def test_a_pass_that_repeats_counts_as_often():
    """Without a reduction between passes, four of them take four times one's time."""
    model = layer()
    times = [simulate(model, cluster(), TOKENS * n, JobPlan.parse("micro_batch=1024")) for n in (1, 2, 4)]
    assert times[2].parts["experts"] == pytest.approx(4 * times[0].parts["experts"])
    each = times[1].seconds - times[0].seconds
    assert times[2].seconds == pytest.approx(times[0].seconds + 3 * each)
    assert sum(times[2].parts.values()) == pytest.approx(times[2].seconds)


def test_four_thousand_ranks():
    model = parse_model("layer:model_dim=1024,hidden_dim=4096,num_experts=512,top_k=2")
    where = Cluster.parse("a100-ndv4:nodes=512,slow_node=7@0.5")
    step = simulate(
        model, where, 4096 * 1024, JobPlan.parse("degree=2,algorithm=2dh,r=8"), traffic=parse_traffic("zipf")
    )
    assert len(step.parts_W["experts"]) == 4096
    assert step.num_events < 100
    assert sum(step.parts.values()) == pytest.approx(step.seconds)


@pytest.mark.parametrize(
    ("batch", "plan", "message"),
    [
        (TOKENS + 1, "", "does not divide over 4 ranks; the nearest is 4096"),
        (0, "", "batch=0"),
        (TOKENS, "micro_batch=3", "micro_batch=3 does not divide the 1024 samples"),
        (TOKENS, "dense_shards=3", r"dense_shards=3 does not divide 4 ranks; legal values are \[1, 2, 4\]"),
        (TOKENS, "replicas=3", "replicas=3 does not divide 4 ranks"),
        (TOKENS, "r=2", "r=2 with 1 slices per expert; legal values are 0, 1"),
    ],
)
def test_plans_that_do_not_fit_the_ranks_are_refused(batch, plan, message):
    with pytest.raises(ConfigError, match=message):
        simulate(layer(), cluster(), batch, JobPlan.parse(plan))


def test_ranks_to_watch_exist():
    with pytest.raises(ConfigError, match=r"rank 4 is none of 0..3"):
        simulate(layer(), cluster(), TOKENS, watch=[4])


def test_an_exchange_is_over_when_its_last_rank_is():
    clocks = Clocks(cluster())
    clocks.compute("work", torch.tensor([1.0, 2.0, 3.0, 4.0]))
    pairs = torch.tensor([0, 0, 1, 1])
    arrival = clocks.send("send", [Stage(torch.full((4,), 0.5, dtype=torch.float64), pairs)])
    clocks.wait(arrival)
    assert clocks.now_W.tolist() == [2.5, 2.5, 4.5, 4.5]
    assert clocks.parts_W[WAIT].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert clocks.path["work"].tolist() == [2.0, 2.0, 4.0, 4.0]
    assert clocks.finish() == 4.5
    assert clocks.path["work"].tolist() == [4.0] * 4


def test_latest_of_groups():
    value, rank = latest(torch.tensor([1.0, 5.0, 5.0, 2.0]), torch.tensor([1, 0, 0, 1]))
    assert value.tolist() == [2.0, 5.0, 5.0, 2.0]
    assert rank.tolist() == [3, 1, 1, 3]


def test_it_agrees_with_the_cost_model_where_both_apply():
    """One layer, equal ranks, nothing overlapped: the tuner's figure for the same constants."""
    from flexpert.simulate.durations import Durations
    from flexpert.simulate.job import layer_shape
    from flexpert.simulate.layer import LayerCall
    from flexpert.tune import Workload, predict

    where, model = cluster(), layer()
    shape = layer_shape(model, model.blocks[0].experts, where, JobPlan())
    workload = Workload.uniform(shape, 1024, tokens=1024, capacity=256)
    for text in ("r=1,capacity=padded", "r=0"):
        plan = JobPlan.parse(text).execution
        assert isinstance(plan, ExecutionPlan)
        clocks, call = Clocks(where), LayerCall(Durations(where), shape, plan, workload)
        call.forward(clocks)
        call.backward(clocks)
        ours = clocks.finish()
        assert ours == pytest.approx(predict(shape, plan, workload, PLAIN).seconds, rel=0.05)
