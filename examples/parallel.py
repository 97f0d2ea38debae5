"""A layer on four ranks under several plans: `python examples/parallel.py` starts them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from flexpert import MoE, MoEConfig
from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize
from flexpert.testing import run_ranks


def train() -> list[str]:
    """What one rank does; under torchrun this would be the script."""
    torch.manual_seed(0)
    layer = MoE(MoEConfig(model_dim=32, hidden_dim=64, num_experts=4, top_k=2))
    mesh = expert_mesh(num_experts=4, slices=2, ranks_per_node=1)
    parallelize(layer, mesh)
    x = torch.randn(100 + 50 * dist.get_rank(), 32)
    lines = []
    for r in mesh.legal_r:
        mesh.traffic.reset()
        y = layer(x, plan=ExecutionPlan(r=r, degree=2))
        lines.append(f"r={r}: output norm {y.norm():.4f}, {mesh.traffic.between:,} bytes sent")
    return lines


if __name__ == "__main__":
    for rank, lines in enumerate(run_ranks(train, 4)):
        print(f"rank {rank}", *lines, sep="\n  ")
