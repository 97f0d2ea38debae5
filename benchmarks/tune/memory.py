"""Peak memory of a training step on a rank, beside what the cost model says."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flexpert import MoE, MoEConfig
from flexpert.ops import memory as reuse
from flexpert.parallel import ExecutionPlan, expert_mesh, groups_by_mesh, parallelize
from flexpert.tune import LayerShape, Workload
from flexpert.tune.memory import memory_of

PLANS = (
    ExecutionPlan(r=0),
    ExecutionPlan(r=1),
    ExecutionPlan(r=1, degree=4),
    ExecutionPlan(r=2),
    ExecutionPlan(r=1, algorithm="2dh"),
    ExecutionPlan(r=1, capacity="padded"),
)
DIMS = ((512, 640, 6144, False), (256, 768, 5120, True))
# Numbers of mallopt's options: the threshold of mmap, and nothing kept at the top of the heap.
MALLOC = {-3: 32 * 1024, -2: 0, -1: 0}
CASES = [(plan, dims) for plan in PLANS for dims in DIMS]
ALONE = [CASES.index((ExecutionPlan(r=1), dims)) for dims in DIMS]  # that one rank can run, too


def mib(key: str) -> float:
    """This process's VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def peak_of_step(case: int) -> dict[str, Any]:
    """MiB of parameters, gradients, moments and a step at its peak, in a process that did nothing before."""
    # Every tensor worth counting has pages of its own, which return when it is freed; those that the
    # operators keep for the next call would be counted although the system may take them.
    for option, value in MALLOC.items():
        ctypes.CDLL(None).mallopt(option, value)
    ctypes.CDLL(None).malloc_trim(0)
    reuse._enabled = False
    plan, (model_dim, hidden_dim, tokens, gated) = CASES[case]
    mesh = expert_mesh(2, ranks_per_node=2)
    _step(mesh, plan, 32, 64, 64, gated)  # what is set up once
    measured, parts = _step(mesh, plan, model_dim, hidden_dim, tokens, gated)
    table = torch.empty(dist.get_world_size(), dtype=torch.float64)
    dist.all_gather_single(table, torch.tensor([measured], dtype=torch.float64))
    words = f"{dist.get_world_size()} ranks, r={plan.r} degree={plan.degree} {plan.algorithm} {plan.capacity}"
    return {
        "plan": f"{words}, D {model_dim}, F {hidden_dim}{', gated' if gated else ''}",
        "tokens": tokens,
        "measured_mib": float(table.max()),
        "predicted_mib": sum(parts.values()) / 2**20,
        "parts": {name: size / 2**20 for name, size in parts.items()},
    }


def _step(
    mesh: Any, plan: ExecutionPlan, model_dim: int, hidden_dim: int, tokens: int, gated: bool
) -> tuple[float, dict[str, int]]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = mib("VmRSS")
    config = MoEConfig(
        model_dim=model_dim, hidden_dim=hidden_dim, num_experts=2, expert="glu" if gated else "mlp"
    )
    torch.manual_seed(0)
    layer = MoE(config)
    parallelize(layer, mesh)
    groups = groups_by_mesh([{"params": list(layer.parameters())}])
    optimizer = torch.optim.AdamW(groups, fused=True)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(tokens, model_dim).requires_grad_()
    for _ in range(2):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM from now on
        y, info = layer(x, plan=plan, return_info=True)
        y.backward(torch.ones_like(y))
        optimizer.step()
        peak = mib("VmHWM")
        counts = info.routing.counts_E.contiguous()
        del y, info
        x.grad = None
    rows_PE = torch.empty(mesh.whole.size, mesh.num_experts, dtype=torch.int64)
    mesh.whole.all_gather(rows_PE.view(-1), counts)
    shape = LayerShape.of(mesh, layer.experts)
    parts = memory_of(shape, plan, Workload(rows_PE=rows_PE, tokens=tokens))
    return peak - before, parts
