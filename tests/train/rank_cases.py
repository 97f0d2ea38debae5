"""A small model, trained, saved and resumed on ranks; run by name, and without ranks as the reference."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from flexpert import MoE, MoEConfig
from flexpert.parallel import clip_grad_norm_, expert_mesh, groups_by_mesh, parallelize
from flexpert.train.checkpoint import latest_checkpoint, save_checkpoint
from flexpert.train.state import collect_state, restore_checkpoint

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
    """Dense layers of sizes that no number of ranks divides, and MoE layers of two kinds of experts."""

    def __init__(self):
        super().__init__()
        options = {"model_dim": D, "hidden_dim": F, "top_k": 3, "expert_bias": True}
        self.before = nn.Linear(D, 5)
        self.between = nn.Linear(5, D)
        self.moe = MoE(MoEConfig(**options, num_experts=E, expert="glu", router=ROUTER))
        groups = [{"name": "mlp", "count": E}, {"name": "constant", "count": 2}]
        self.mixed = MoE(MoEConfig(**options, num_experts=E + 2, expert=groups))

    def forward(self, x):
        x = x + self.between(self.before(x).tanh())
        x = x + self.moe(x)
        return x + self.mixed(x)


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
    for folder in folders:
        model, optimizer, x = build(dense, seed=11)
        step(model, optimizer, x)
        checkpoint = restore_checkpoint(latest_checkpoint(Path(folder)), model, optimizer)
        assert checkpoint.state == {"number": checkpoint.step}
        results.append((whole(model, optimizer), torch.get_rng_state(), step(model, optimizer, x)))
    return results


def whole(model, optimizer):
    """Every tensor of the state, put together."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in collect_state(model, optimizer).items()
        if not name.startswith("random")
    }
