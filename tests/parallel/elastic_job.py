"""A training job that torchrun may restart: each step is saved, each loss written down.

torchrun ... elastic_job.py FOLDER STEPS DIE_AT: at step DIE_AT of its first life rank 1 kills itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from flexpert import MoE, MoEConfig
from flexpert.parallel import expert_mesh, fault_guard, init_process_group, parallelize


def train(folder, steps, die_at=None):
    """Train from the last saved step on; rank 0 saves parameters and losses."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    mesh = expert_mesh(4)
    layer = parallelize(MoE(MoEConfig(model_dim=6, hidden_dim=8, num_experts=4, top_k=2)), mesh, dense="ddp")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for step in range(load(layer, folder), steps):
        if step == die_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with fault_guard(mesh):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(100 * step + rank))
            loss = (layer(x) - x.roll(1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = loss.detach().clone()
            mesh.everyone.all_reduce(total)
            save(layer, folder, step, float(total))


def load(layer, folder):
    """The step to go on with."""
    saved = sorted(folder.glob("*.safetensors"))
    if not saved:
        return 0
    values = load_file(saved[-1])
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            value = values[name]
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)
    return int(saved[-1].stem) + 1


def save(layer, folder, step, loss):
    whole = {n: p.detach() for n, p in layer.named_parameters()}
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in whole.items()}
    if dist.get_rank() == 0:
        whole["loss"] = torch.tensor(loss, dtype=torch.float64)
        save_file(whole, folder / "new")
        (folder / "new").rename(folder / f"{step:03d}.safetensors")


def losses(folder):
    """By step."""
    return [load_file(file)["loss"].item() for file in sorted(folder.glob("*.safetensors"))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_process_group("gloo", timeout=120.0)
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if first_life else None)
    dist.destroy_process_group()
