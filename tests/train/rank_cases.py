"""A small model, trained, saved and resumed on ranks; run by name, and without ranks as the reference."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from flexpert import MoE, MoEConfig
from flexpert.core.errors import FlexpertError
from flexpert.experts import ModuleExperts
from flexpert.parallel import clip_grad_norm_, expert_mesh, groups_by_mesh, parallelize
from flexpert.routers import LinearRouter
from flexpert.train import checkpoint, dcp_storage
from flexpert.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flexpert.train.saver import CheckpointSaver
from flexpert.train.state import collect_state, restore_checkpoint, restore_state
from tests.parallel.cases import unlike

D, E, F = 6, 24, 8
BATCH = 24  # divides by every number of ranks
# Different layouts, so that a checkpoint comes back under other cuts than it was written with.
MESHES = {
    1: {},
    2: {"replicas": 2},
    3: {},
    4: {"slices": 2},
    6: {"replicas": 3, "slices": 2},
    8: {"replicas": 2, "slices": 2},
}


ROUTER = {"name": "linear", "selection_bias": True}


class Model(nn.Module):
    """Dense layers of sizes that no number of ranks divides, and MoE layers of three kinds of experts."""

    def __init__(self):
        super().__init__()
        options = {"model_dim": D, "hidden_dim": F, "top_k": 3, "expert_bias": True}
        self.before = nn.Linear(D, 5)
        self.between = nn.Linear(5, D)
        self.moe = MoE(MoEConfig(**options, num_experts=E, expert="glu", router=ROUTER))
        groups = [{"name": "mlp", "count": E}, {"name": "constant", "count": 2}]
        self.mixed = MoE(MoEConfig(**options, num_experts=E + 2, expert=groups))
        router = LinearRouter(model_dim=D, num_experts=E, top_k=3)
        self.unlike = MoE(router=router, experts=ModuleExperts(unlike(E), model_dim=D))

    def forward(self, x):
        x = x + self.between(self.before(x).tanh())
        x = x + self.moe(x)
        x = x + self.mixed(x)
        return x + self.unlike(x)


def build(dense, seed=7):
    """The model, its optimiser and this rank's share of the batch, on however many ranks there are."""
    torch.manual_seed(seed)
    model = Model().double()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if dist.is_initialized():
        parallelize(model, expert_mesh(E, **MESHES[world]), dense=dense)
    optimizer = torch.optim.AdamW(groups_by_mesh([{"params": list(model.parameters())}]), lr=0.01)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, BATCH, D, generator=generator, dtype=torch.float64)
    rank = dist.get_rank() if dist.is_initialized() else 0
    return model, optimizer, x.chunk(world, dim=1)[rank]


def step(model, optimizer, x):
    """One step; the loss over all ranks, before it."""
    loss = (model(x[0]) - x[1]).square().mean()
    loss.backward()
    clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total


def train(dense, steps=2):
    model, optimizer, x = build(dense)
    model.moe.router.selection_bias.copy_(torch.linspace(-0.01, 0.01, E))
    for _ in range(steps):
        step(model, optimizer, x)
    return model, optimizer, x


def save_run(folder, dense, number=2):
    """Two steps, then a checkpoint; the state as one process has it, the loss of the third step."""
    model, optimizer, x = train(dense)
    torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))
    save_checkpoint(Path(folder), number, collect_state(model, optimizer), {"number": number})
    return whole(model, optimizer), torch.get_rng_state(), step(model, optimizer, x)


def resume_runs(folders, dense):
    """For each folder what `save_run` returned, of a model that began elsewhere and was then resumed."""
    results = []
    for i, folder in enumerate(folders):
        model, optimizer, x = build(dense, seed=11)
        step(model, optimizer, x)
        path = latest_checkpoint(Path(folder))
        if i % 2:
            loaded = restore_checkpoint(path, model, optimizer)
        else:  # from whole tensors
            loaded = load_checkpoint(path)
            restore_state(model, optimizer, loaded.tensors)
        assert loaded.state == {"number": loaded.step}
        results.append((whole(model, optimizer), torch.get_rng_state(), step(model, optimizer, x)))
    return results


def whole(model, optimizer):
    """Every tensor of the state, put together; those of unlike experts are collected from all ranks."""
    state = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in collect_state(model, optimizer).items()
        if not name.startswith("random")
    }
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, {name: state[name] for name in state if ".unlike.experts" in name})
        for part in every:
            for name, value in part.items():
                assert torch.equal(state.setdefault(name, value), value), name
    return state


def save_and_die(folder, victim, where):
    """The first checkpoint is written; in the second one a rank is killed when it comes to `where`."""
    model, optimizer, _ = build("ddp")
    tensors = collect_state(model, optimizer)
    save_checkpoint(Path(folder), 1, tensors, {})
    if dist.get_rank() == victim:
        setattr(checkpoint, where, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    save_checkpoint(Path(folder), 2, tensors, {})


def save_on_a_full_disk(folder):
    """Rank 1 has no room the second time; what each rank raises, and what lies there afterwards."""
    model, optimizer, _ = build("ddp")
    tensors = collect_state(model, optimizer)
    save_checkpoint(Path(folder), 1, tensors, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    try:
        raised = _error_of(lambda: save_checkpoint(Path(folder), 2, tensors, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()
    left = sorted(path.name for path in Path(folder).iterdir())
    dist.barrier()
    save_checkpoint(Path(folder), 3, tensors, {})
    return raised, left


def resume_with_faults(folder):
    """What each rank raises where a file has another bit, or rank 1 another model; whether state moved."""
    model, optimizer, x = build("fsdp", seed=11)
    step(model, optimizer, x)
    before, path = whole(model, optimizer), latest_checkpoint(Path(folder))
    errors = {}
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        dist.barrier()
        content = (path / name).read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            (path / name).write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        dist.barrier()
        errors[name] = _error_of(lambda: restore_checkpoint(path, model, optimizer))
        dist.barrier()
        if dist.get_rank() == 0:
            (path / name).write_bytes(content)
    dist.barrier()
    if dist.get_rank() == 1:
        model.register_buffer("other", torch.zeros(3))
    errors["other model"] = _error_of(lambda: restore_checkpoint(path, model, optimizer))
    if dist.get_rank() == 1:
        del model.other
    after = whole(model, optimizer)
    same = all(torch.equal(before[name], after[name]) for name in before)
    restore_checkpoint(path, model, optimizer)  # now that all is mended
    return errors, same, whole(model, optimizer)


def save_in_background(folder):
    """Training goes on while a save is held up; then a save fails, and the next one says so."""
    model, optimizer, x = train("fsdp")
    hold, write = threading.Event(), checkpoint.write_tensors

    def write_late(*args):
        hold.wait(60)
        write(*args)

    def fail(*args):
        raise OSError(28, "No space left on device")

    writer = dcp_storage._AnonymousWriter
    with CheckpointSaver(Path(folder)) as saver:
        checkpoint.write_tensors = write_late
        try:
            want = whole(model, optimizer)
            saver.save(2, collect_state(model, optimizer), {"number": 2})
            loss = step(model, optimizer, x)
            published = latest_checkpoint(Path(folder))
            hold.set()
            path = saver.wait()
            if dist.get_rank() == 1:
                writer.write_data = fail
            saver.save(3, collect_state(model, optimizer), {"number": 3})
            saver._thread.join()
            if dist.get_rank() == 1:
                del writer.write_data
            told = _error_of(lambda: saver.save(4, collect_state(model, optimizer), {"number": 4}))
            saver.save(5, collect_state(model, optimizer), {"number": 5})
        finally:
            checkpoint.write_tensors = write
    return want, loss, published, path.name, told, whole(model, optimizer)


def _error_of(work):
    try:
        work()
    except FlexpertError as error:
        return f"{type(error).__name__}: {error}"
    return None
