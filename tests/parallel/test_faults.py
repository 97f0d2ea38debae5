"""A rank killed, stopped, late or in disagreement: the others get one error that says so, and soon."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist

from flexpert import DistributedError, InputError, MoE, MoEConfig
from flexpert.parallel import ExecutionPlan, expert_mesh, fault_guard, parallelize
from tests.parallel.worlds import run_world

OPERATIONS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")


def start(group, name, part=1000):
    x = torch.ones(group.size * part)
    match name:
        case "all_to_all":
            return group.all_to_all(torch.empty_like(x), x, async_op=True)
        case "all_gather":
            return group.all_gather(x.new_empty(group.size * len(x)), x, async_op=True)
        case "reduce_scatter":
            return group.reduce_scatter(x.new_empty(part), x, async_op=True)
    return group.all_reduce(x, async_op=True)


def lose(number, heartbeat, victim):
    """What the others are told when `victim` gets a signal while collectives are under way.

    Each has a mesh of its own: gloo's groups are of no use after a failure.
    """
    meshes = [expert_mesh(num_experts=6, timeout=3.0, heartbeat=heartbeat) for _ in OPERATIONS]
    for mesh, name in zip(meshes, OPERATIONS, strict=True):
        start(mesh.everyone, name).wait()
    if dist.get_rank() == victim:
        start(meshes[0].everyone, OPERATIONS[0])
        os.kill(os.getpid(), number)
    pending = [start(mesh.everyone, name) for mesh, name in zip(meshes, OPERATIONS, strict=True)]
    return [until_error(*each) for each in zip(pending, meshes, OPERATIONS, strict=True)]


def until_error(pending, mesh, name):
    """The message; what the lost rank had begun may still succeed."""
    try:
        while True:
            pending.wait()
            pending = start(mesh.everyone, name)
    except DistributedError as error:
        return str(error)


SIGNALS = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])


@SIGNALS
def test_a_lost_rank_is_named_by_all_others_in_every_collective(number):
    told = run_world(lose, 3, number, 0.3, 2, lost=[2])
    assert told.keys() == {0, 1}
    for rank, messages in told.items():
        for name, text in zip(OPERATIONS, messages, strict=True):
            assert text.startswith(
                f"{name} on group 'all ranks' (ranks (0, 1, 2), this is {rank}) failed after "
            )
            verdict = text.partition(" s: ")[2].partition(". The backend's words")[0]
            assert re.fullmatch(r"rank 2 is lost: no sign of life for \d+\.\d s", verdict), text


@SIGNALS
def test_a_lost_host_of_the_store_is_told_as_such(number):
    told = run_world(lose, 2, number, 0.3, 0, lost=[0])
    for text in told[1]:
        assert "its host, rank 0 or torchrun's agent, may be lost, or this machine cut off from it" in text


def test_without_a_heartbeat_nobody_is_blamed():
    told = run_world(lose, 2, signal.SIGKILL, 0, 1, lost=[1])
    for text in told[0]:
        assert "which rank is lost is not known (call expert_mesh with heartbeat=1.0 to be told)" in text


def layer(mesh):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 6), MoE(MoEConfig(model_dim=6, hidden_dim=8, num_experts=6))
    )
    return parallelize(model, mesh)


def fail_alone():
    """Rank 1 has a bad input, says so and lives on; the others must not wait for it as long as they may."""
    mesh = expert_mesh(num_experts=6, timeout=600.0, heartbeat=0.3)
    model = layer(mesh)
    x = torch.randn(4, 5 if dist.get_rank() == 1 else 6)
    try:
        with fault_guard(mesh):
            model[1](x)
    except (DistributedError, InputError) as error:
        return type(error).__name__, str(error)


def test_an_error_of_one_rank_ends_the_others_before_the_timeout():
    results = run_world(fail_alone, 3)
    assert results[1][0] == "InputError"
    for rank in (0, 2):
        name, text = results[rank]
        assert name == "DistributedError"
        assert text.startswith("1.experts: all_to_all on group 'expert parallel' (ranks (0, 1, 2)")
        assert "rank 1 gave up: InputError: x has shape (4, 5)" in text


def lose_in_backward(plan):
    mesh = expert_mesh(num_experts=6, timeout=30.0, heartbeat=0.3)
    model = layer(mesh)
    y = model[1](torch.randn(4, 6, requires_grad=True), plan=plan)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with fault_guard(mesh):
            y.sum().backward()
    except DistributedError as error:
        return str(error)


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (ExecutionPlan(), "1.experts (backward): all_to_all on group 'expert parallel'"),
        (ExecutionPlan(r=0), "1.experts parameters (backward): reduce_scatter on group 'expert parallel'"),
    ],
    ids=["r=1", "r=0"],
)
def test_a_loss_in_the_backward_pass_names_the_layer(plan, what):
    text = run_world(lose_in_backward, 2, plan, lost=[1])[0]
    assert text.startswith(what)
    assert "rank 1 is lost" in text


def leave():
    """Rank 1 ends by itself while rank 0 waits."""
    mesh = expert_mesh(num_experts=2, timeout=30.0, heartbeat=0.3)
    if dist.get_rank() == 1:
        mesh.heartbeat.stop()
        return None
    time.sleep(0.1)
    assert mesh.heartbeat.lost() == []
    return mesh.heartbeat.verdict()


def test_a_rank_that_left_is_told_apart_from_a_lost_one():
    assert run_world(leave, 2)[0] == "rank 1 ended or closed its mesh"
