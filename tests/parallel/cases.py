"""Layers, batches and the comparison of several ranks with one process; run on ranks by name."""

from __future__ import annotations

import torch
import torch.distributed as dist

from flexpert import MoE, MoEConfig, RoutingContext
from flexpert.experts import ExpertBank, ModuleExperts, StackedModules
from flexpert.parallel import ExecutionPlan, clip_grad_norm_, expert_mesh, groups_by_mesh, parallelize
from flexpert.routers import build_router

D, F = 6, 8
MIXED = [
    {"name": "mlp", "count": 4},
    {"name": "copy", "count": 1},
    {"name": "glu", "count": 4, "hidden_dim": 4},
    {"name": "zero", "count": 1},
    {"name": "constant", "count": 2},
]


def make_layer(kind="mlp", dtype=torch.float64, **options):
    """A layer that is the same on every rank, with biases that are not 0."""
    torch.manual_seed(7)
    defaults = {"model_dim": D, "hidden_dim": F, "num_experts": 4, "top_k": 2, "expert_bias": True}
    settings = {**defaults, **options}
    if kind == "mixed":
        settings |= {"expert": MIXED, "num_experts": 12}
    elif kind not in WITH_PARTS:
        settings["expert"] = kind
    config = MoEConfig(**settings)
    layer = WITH_PARTS[kind](config) if kind in WITH_PARTS else MoE(config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "b1" in name or "b2" in name:
                parameter.normal_()
    return layer.to(dtype)


def _with_modules(config):
    shapes = [F, 3, F, 5] * (config.num_experts // 4)
    modules = [
        torch.nn.Sequential(torch.nn.Linear(D, width), torch.nn.GELU(), torch.nn.Linear(width, D))
        for width in shapes
    ]
    return MoE(router=build_router(config), experts=ModuleExperts(modules, model_dim=D))


class Buffered(torch.nn.Module):
    """An MLP with two buffers, one along its hidden dimension, one of integers."""

    def __init__(self, place):
        super().__init__()
        self.up, self.down = torch.nn.Linear(D, F), torch.nn.Linear(F, D)
        self.register_buffer("scale", torch.rand(F) + 0.5)
        self.register_buffer("place", torch.tensor(place))

    def forward(self, rows):
        return self.down(torch.tanh(self.up(rows) * self.scale) * (1 + self.place))


def _stacked(config):
    experts = StackedModules(
        [Buffered(place) for place in range(config.num_experts)],
        model_dim=D,
        slice_dims={"up.weight": 0, "up.bias": 0, "scale": 0, "down.weight": 1},
        once=["down.bias"],
    )
    return MoE(router=build_router(config), experts=experts)


WITH_PARTS = {"modules": _with_modules, "stacked": _stacked}


def tokens_of(counts, dtype=torch.float64):
    """Inputs and output gradients of all ranks, one after the other."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(counts), D, generator=generator, dtype=torch.float64)
    g = torch.randn(sum(counts), D, generator=generator, dtype=torch.float64)
    return x.to(dtype), g.to(dtype)


def collect(layer, x, y, optimizer, norm, scale=1.0):
    """What must be equal: output, input gradient, norm, parameter gradients, parameters after a step.

    A rank's input has the gradient of that rank's loss: `scale` is the share of it in the mean over ranks.
    """
    gradients = {name: whole(p.grad) for name, p in layer.named_parameters() if p.grad is not None}
    clipped = clip_grad_norm_(layer, norm) if norm else None
    optimizer.step()
    parameters = {name: whole(p.detach()) for name, p in layer.named_parameters()}
    return {
        "output": y.detach().clone(),
        "input gradient": x.grad * scale,
        "gradients": gradients,
        "norm": clipped,
        "parameters": parameters,
    }


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def on_one_process(kind, counts, *, dtype=torch.float64, context=None, norm=None, **options):
    """The reference: the concatenated batch, the loss divided by the number of ranks."""
    layer = make_layer(kind, dtype, **options)
    x, g = tokens_of(counts, dtype)
    x.requires_grad_()
    y = layer(x, context=context)
    ((y * g).sum() / len(counts)).backward()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    return collect(layer, x, y, optimizer, norm)


def on_ranks(
    kind,
    counts,
    plans,
    *,
    dtype=torch.float64,
    mesh=None,
    norm=None,
    backwards=1,
    options=None,
    only=None,
):
    """Each plan after the other on one rank's share; a list of results, and whether any storage moved."""
    rank = dist.get_rank()
    layer = make_layer(kind, dtype, **(options or {}))
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    mesh = expert_mesh(**(mesh or {"num_experts": 4}))
    parallelize(layer, mesh, dense="ddp")
    x, g = tokens_of(counts, dtype)
    x, g = x.split(counts)[rank].clone(), g.split(counts)[rank]
    groups = groups_by_mesh([{"params": list(layer.parameters())}])
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    pointers = [_local(p).data_ptr() for p in layer.parameters()]
    results = []
    for plan in plans:
        _reset(layer, optimizer, start)
        x = x.detach().requires_grad_()
        for _ in range(backwards):
            y = layer(x, plan=ExecutionPlan(**plan), context=context_for(only, layer))
            ((y * g).sum() / backwards).backward()
        results.append(collect(layer, x, y, optimizer, norm, 1 / len(counts)))
    moved = pointers != [_local(p).data_ptr() for p in layer.parameters()]
    return results, moved


def _local(p):
    return p.detach().to_local() if hasattr(p, "to_local") else p


@torch.no_grad()
def _reset(layer, optimizer, start):
    """The layer as it was before the step of another plan."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    optimizer.state.clear()
    for name, parameter in layer.named_parameters():
        parameter.grad = None
        value = start[name]
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(value.to_local())
        else:
            parameter.copy_(value)


class ScaleExperts(ExpertBank):
    """A bank of one's own: y = s * x, stacked, not sliceable."""

    def __init__(self, num_experts):
        super().__init__(num_experts=num_experts, model_dim=D, output_dim=D)
        self.scale = torch.nn.Parameter(torch.randn(num_experts, D))


def context_for(only, layer):
    """Every token may choose these experts alone; None: all."""
    if only is None:
        return None
    return RoutingContext(expert_mask=torch.isin(torch.arange(layer.router.num_experts), torch.tensor(only)))


def batch_context(counts):
    return RoutingContext(num_groups=len(counts))
