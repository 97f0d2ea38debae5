"""Collectives of DDP, FSDP, DTensor and checkpoints: a lost rank is told as in those of Flexpert."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from flexpert import DistributedError, MoE, MoEConfig
from flexpert.parallel import dense, expert_mesh, fault_guard, no_sync, parallelize
from flexpert.testing import assert_close, run_ranks
from flexpert.train import dcp_storage
from flexpert.train.checkpoint import save_checkpoint
from tests.parallel.worlds import run_world

D = 6
TIMEOUT = 3.0


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), MoE(MoEConfig(model_dim=D, hidden_dim=8, num_experts=2)), nn.Tanh())


def step(model):
    model(torch.randn(4, D)).square().sum().backward()


def lose_here(owner, name, number):
    """From now on rank 1 loses itself where it comes to `owner.name`."""
    if dist.get_rank() == 1:
        setattr(owner, name, lambda *args, **kwargs: os.kill(os.getpid(), number))


def ddp(mesh, number):
    model = parallelize(build(), mesh, dense="ddp")
    step(model)
    lose_here(dense._DDPAverage, "start", number)
    step(model)


def ddp_set_up(mesh, number):
    model = parallelize(build(), mesh, dense="ddp")
    lose_here(model, "forward", number)
    lose_here(nn.parallel.DistributedDataParallel, "__init__", number)
    step(model)


def fsdp_gather(mesh, number):
    model = parallelize(build(), mesh, dense="fsdp")
    step(model)
    lose_here(dense._AllGather, "__call__", number)
    step(model)


def fsdp_reduce(mesh, number):
    model = parallelize(build(), mesh, dense="fsdp")
    step(model)
    lose_here(dense._ReduceScatter, "__call__", number)
    step(model)


def hsdp_reduce(mesh, number):
    both = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts"))
    model = parallelize(build(), mesh, dense="fsdp", dense_mesh=both)
    step(model)
    lose_here(dist, "all_reduce", number)
    step(model)


def dtensor(mesh, number):
    one = init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(torch.ones(3), one, [Shard(0)])
    tensor.full_tensor()
    lose_here(DTensor, "full_tensor", number)
    tensor.full_tensor()


def dtensor_operator(mesh, number):
    """An operator that needs a whole tensor gathers it by itself."""
    rows = DTensor.from_local(torch.ones(1, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    assert torch.equal((rows @ rows).to_local(), torch.full((1, 2), 2.0))
    lose_here(DTensor, "__matmul__", number)
    rows @ rows


def checkpoint(mesh, number, folder):
    tensors = {"a": torch.ones(3)}
    save_checkpoint(Path(folder), 1, tensors, {})
    lose_here(dcp_storage._AnonymousWriter, "prepare_local_plan", number)
    save_checkpoint(Path(folder), 2, tensors, {})


def told(work, number, *arguments):
    """What a rank is told of the loss of rank 1."""
    mesh = expert_mesh(2, timeout=TIMEOUT, heartbeat=0.3)
    dist.distributed_c10d._set_pg_timeout(mesh.timeout)
    try:
        with fault_guard(mesh):
            work(mesh, number, *arguments)
    except DistributedError as error:
        return str(error)


HERE = r"\(ranks \(0, 1\), this is 0\) failed"
CASES = [
    (ddp, rf"dense part \(DDP\): all_reduce on group 'data parallel' {HERE} after"),
    (ddp_set_up, f"DDP: set-up on group 'all ranks' {HERE}"),
    (fsdp_gather, rf"dense part \(FSDP\): all_gather on group '[^']+' {HERE} after"),
    (fsdp_reduce, rf"dense part \(FSDP\): reduce_scatter on group '[^']+' {HERE} after"),
    (hsdp_reduce, f"FSDP: all_reduce on group '[^']+' {HERE}"),
    (dtensor, f"DTensor: redistribute on group '[^']+' {HERE}"),
    (dtensor_operator, f"DTensor: redistribute on group '[^']+' {HERE}"),
]


@pytest.mark.parametrize(("work", "words"), CASES, ids=[work.__name__ for work, _ in CASES])
def test_a_killed_rank_is_told_with_operation_and_group(work, words):
    text = run_world(told, 2, work, signal.SIGKILL, lost=[1])[0]
    assert re.match(words, text), text
    assert "rank 1 is lost: no sign of life for" in text


@pytest.mark.parametrize(("work", "words"), [CASES[0], CASES[3]], ids=["ddp", "fsdp"])
def test_a_stopped_rank_is_told_after_the_timeout(work, words):
    text = run_world(told, 2, work, signal.SIGSTOP, lost=[1])[0]
    assert re.match(words, text), text
    assert "rank 1 is lost: no sign of life for" in text


def test_a_rank_lost_while_a_checkpoint_is_saved(tmp_path):
    text = run_world(told, 2, checkpoint, signal.SIGKILL, str(tmp_path), lost=[1])[0]
    assert re.match(
        r"step 2 was not saved: checkpoint save: torch.distributed.checkpoint: \w+ on group 'all ranks' "
        + HERE,
        text,
    )
    assert "rank 1 is lost: no sign of life for" in text


def gradients(how, accumulate):
    """Of a dense model whose collectives are ours, or PyTorch's own."""
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, D))
        group = expert_mesh(2).everyone
        if how == "ddp":
            from torch.distributed._composable.replicate import replicate

            replicate(model)
            if ours:
                dense.name_ddp(model, group)
        else:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            if ours:
                dense.name_fsdp(model)
        torch.manual_seed(5 + dist.get_rank())
        if accumulate:
            with no_sync(model):
                step(model)
        if how == "fsdp":  # its asynchronous form
            handle = model.unshard(async_op=True)
            handle.wait()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=accumulate):
            step(model)
        results.append([p.grad.full_tensor() if how == "fsdp" else p.grad for p in model.parameters()])
    return results


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_gradients_are_those_of_pytorchs_own_collectives(how, accumulate):
    for ours, theirs in run_ranks(gradients, 2, how, accumulate):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, 1e-7)
            assert a.abs().sum() > 0
