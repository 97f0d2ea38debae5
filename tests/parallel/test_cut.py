"""A node cut off in the middle of collectives: every rank, on both sides, ends with an error that says so."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import time

import pytest
import torch
import torch.distributed as dist

from flexpert import DistributedError
from flexpert.emulate import Cluster
from flexpert.parallel import (
    ExecutionPlan,
    clip_grad_norm_,
    expert_mesh,
    fault_guard,
    full_state_dict,
)
from tests.parallel.test_faults import OPERATIONS, layer, start
from tests.processes import PATIENCE, wait_for

TIMEOUT = 2.0
OUT_OF_REACH = (
    "the store (does not answer for [0-9.]+ s|has hung up): its host, rank 0 or torchrun's agent, may be "
    "lost, or this machine cut off from it; of the other ranks nothing is known"
)
UNKNOWN = re.escape("which rank is lost is not known (call expert_mesh with heartbeat=1.0 to be told)")


def lost(rank):
    return f"rank {rank} is lost: no sign of life for [0-9.]+ s"


def errors_after_cut(folder, node, work, *arguments):
    """What each rank of 3 nodes tells by `work(turn, *arguments)`, cut when all have begun; none ends well.

    A turn is a function to be called when this rank has been through the collectives once more.
    """
    turns = multiprocessing.get_context("fork").Array("q", 3)

    def on_rank():
        rank = dist.get_rank()

        def turn():
            turns[rank] += 1

        texts = work(turn, *arguments)
        (folder / str(rank)).write_text(json.dumps(texts))
        raise DistributedError("; ".join(texts))

    with Cluster(3, bandwidth="100mbit") as cluster:
        if cluster.mode == "loopback":
            pytest.skip(f"no node can be cut off: {cluster.missing}")
        job = cluster.start(on_rank, collective_timeout=60.0)
        wait_for(lambda: min(turns) > 1)
        cluster.cut(node)
        outcomes = job.wait(PATIENCE, keep_going=True)
    assert [(outcome.exit_code, outcome.ended_by_us) for outcome in outcomes] == [(1, "")] * 3
    return [json.loads((folder / str(rank)).read_text()) for rank in range(3)]


def collectives(turn, heartbeat):
    """All of them at once, each on a mesh of its own, again and again."""
    meshes = [expert_mesh(6, timeout=TIMEOUT, heartbeat=heartbeat) for _ in OPERATIONS]
    texts = {}
    while not texts:
        pending = [start(mesh.everyone, name, 20_000) for mesh, name in zip(meshes, OPERATIONS, strict=True)]
        turn()
        for name, one in zip(OPERATIONS, pending, strict=True):
            note(texts, name, one.wait)
    for mesh, name in zip(meshes, OPERATIONS, strict=True):  # what had just succeeded here
        while name not in texts:
            note(texts, name, start(mesh.everyone, name, 20_000).wait)
    return [texts[name] for name in OPERATIONS]


def note(texts, name, call):
    try:
        call()
    except DistributedError as error:
        texts[name] = str(error)


@pytest.mark.parametrize(
    ("node", "heartbeat", "verdicts"),
    [
        (2, 0.3, [[lost(2)], [lost(2)], [OUT_OF_REACH]]),
        (0, 0.3, [[lost(1), lost(2)], [OUT_OF_REACH], [OUT_OF_REACH]]),
        (1, 0, [[UNKNOWN]] * 3),
    ],
    ids=["a node", "the store's node", "no heartbeat"],
)
def test_every_collective_ends_on_both_sides(tmp_path, node, heartbeat, verdicts):
    told = errors_after_cut(tmp_path, node, collectives, heartbeat)
    for rank, (texts, verdict) in enumerate(zip(told, verdicts, strict=True)):
        for name, text in zip(OPERATIONS, texts, strict=True):
            where = f"{name} on group 'all ranks' (ranks (0, 1, 2), this is {rank}) failed after "
            assert text.startswith(where)
            # On a machine that stood still for a while others may seem lost besides.
            assert all(re.search(words, text) for words in verdict), text


WHERE = {
    "clip_grad_norm_": "clip_grad_norm_: all_reduce on mesh axis 'expert' (ranks (0, 1, 2)) failed",
    "full_state_dict": "full_state_dict: all_gather of 1.experts.w",
    "step": "1.experts",
}


def composed(turn, name):
    mesh = expert_mesh(6, timeout=TIMEOUT, heartbeat=0.3)
    model = layer(mesh)
    model(torch.ones(4, 6)).sum().backward()
    call = {
        "clip_grad_norm_": lambda: clip_grad_norm_(model, 1.0),
        "full_state_dict": lambda: full_state_dict(model),
        "step": lambda: step(mesh, model),
    }[name]
    texts = {}
    while not texts:
        note(texts, name, call)
        turn()
    return list(texts.values())


def step(mesh, model):
    plan = ExecutionPlan(degree=2, algorithm="2dh")
    with fault_guard(mesh):
        model[1](torch.randn(4, 6, requires_grad=True), plan=plan).sum().backward()


@pytest.mark.parametrize("name", WHERE)
def test_what_is_made_of_collectives_ends_as_well(tmp_path, name):
    for rank, (text,) in enumerate(errors_after_cut(tmp_path, 2, composed, name)):
        assert text.startswith(WHERE[name])
        assert re.search(OUT_OF_REACH if rank == 2 else lost(2), text), text


def meshes(turn):
    texts = {}
    while not texts:
        note(texts, "expert_mesh", lambda: expert_mesh(6, timeout=TIMEOUT, heartbeat=0))
        turn()
    return list(texts.values())


def test_a_mesh_under_construction_ends_as_well(tmp_path):
    """Wherever the cut finds it: at the store, or while groups are made."""
    for rank, (text,) in enumerate(errors_after_cut(tmp_path, 2, meshes)):
        assert re.match(
            r"expert_mesh on ranks \(0, 1, 2\): |making a group of ranks \([012, ]+\) failed: ", text
        )
        if rank == 2:
            assert re.search(f"cut off from it|{UNKNOWN}", text)


def stands_still(turns):
    """No rank comes further in a fifth of a second, longer than a heartbeat counts."""
    before = list(turns)
    time.sleep(0.2)
    return list(turns) == before


def test_a_short_cut_is_no_fault():
    """Until the timeout the network may come back, and everything goes on."""
    turns = multiprocessing.get_context("fork").Array("q", 3)

    def count():
        mesh = expert_mesh(6, timeout=PATIENCE, heartbeat=0.1)
        for turn in itertools.count():
            ended = torch.tensor([int(turns[2])])
            mesh.everyone.all_reduce(ended, "max")
            turns[dist.get_rank()] = turn
            if ended:
                break
        return turn

    with Cluster(2) as cluster:
        if cluster.mode == "loopback":
            pytest.skip(f"no node can be cut off: {cluster.missing}")
        job = cluster.start(count)
        wait_for(lambda: min(turns[:2]) > 1)
        cluster.cut(1)
        wait_for(lambda: stands_still(turns))
        cluster.heal(1)
        before = min(turns[:2])
        wait_for(lambda: min(turns[:2]) > before + 1)
        turns[2] = 1
        outcomes = job.wait(PATIENCE)
    assert all(outcome.ok for outcome in outcomes)
    assert outcomes[0].value == outcomes[1].value
