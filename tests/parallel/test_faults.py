"""A rank killed, stopped, late or in disagreement: the others get one error that says so, and soon."""

from __future__ import annotations

import os
import re
import signal

import pytest
import torch
import torch.distributed as dist

from flexpert import DistributedError
from flexpert.parallel import expert_mesh
from tests.parallel.worlds import run_world

OPERATIONS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")


def start(group, name):
    x = torch.ones(group.size * 1000)
    match name:
        case "all_to_all":
            return group.all_to_all(torch.empty_like(x), x, async_op=True)
        case "all_gather":
            return group.all_gather(x.new_empty(group.size * len(x)), x, async_op=True)
        case "reduce_scatter":
            return group.reduce_scatter(x.new_empty(1000), x, async_op=True)
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
        assert (
            "its host, rank 0 or torchrun's agent, may be lost; of the other ranks nothing is known" in text
        )


def test_without_a_heartbeat_nobody_is_blamed():
    told = run_world(lose, 2, signal.SIGKILL, 0, 1, lost=[1])
    for text in told[0]:
        assert "which rank is lost is not known (call expert_mesh with heartbeat=1.0 to be told)" in text
