"""Layers, batches and the comparison of several ranks with one process; run on ranks by name."""

from __future__ import annotations

import torch
import torch.distributed as dist

from flexpert import MoE, MoEConfig, RoutingContext
from flexpert.experts import ExpertBank, ModuleExperts, StackedModules
from flexpert.parallel import ExecutionPlan, clip_grad_norm_, expert_mesh, groups_by_mesh, parallelize
from flexpert.parallel.pieces import Pieces
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


class Buffered(torch.nn.Module):
    """An MLP with two buffers, one along its hidden dimension, one of integers."""

    def __init__(self, place):
        super().__init__()
        self.up, self.down = torch.nn.Linear(D, F), torch.nn.Linear(F, D)
        self.register_buffer("scale", torch.rand(F) + 0.5)
        self.register_buffer("place", torch.tensor(place))

    def forward(self, rows):
        return self.down(torch.tanh(self.up(rows) * self.scale) * (1 + self.place))


class Scale(torch.nn.Module):
    """y = s x, of one number, which starts at 1."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, rows):
        return self.factor * rows


def _tied():
    """Two layers with one weight and, in the first, a bias that is not trained."""
    module = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Tanh(), torch.nn.Linear(D, D))
    module[2].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    return module


def unlike(count):
    """Modules of all sorts: of several sizes, tied, frozen in part, with buffers, of one number, of none."""
    kinds = (
        lambda: torch.nn.Sequential(torch.nn.Linear(D, F), torch.nn.GELU(), torch.nn.Linear(F, D)),
        lambda: Buffered(3),
        _tied,
        Scale,
        lambda: torch.nn.LayerNorm(D),
        torch.nn.Identity,
    )
    return [kinds[place % len(kinds)]() for place in range(count)]


def _with_modules(config):
    return MoE(router=build_router(config), experts=ModuleExperts(unlike(config.num_experts), model_dim=D))


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
    gradients = by_name(layer, {n: p.grad for n, p in layer.named_parameters() if p.grad is not None})
    clipped = clip_grad_norm_(layer, norm) if norm else None
    optimizer.step()
    parameters = by_name(layer, {name: p.detach() for name, p in layer.named_parameters()})
    return {
        "output": y.detach().clone(),
        "input gradient": x.grad * scale,
        "gradients": gradients,
        "norm": clipped,
        "parameters": parameters,
    }


def by_name(layer, tensors):
    """Whole tensors under the names of one process, tied ones once."""
    pieces, result, seen = Pieces(layer), {}, set()
    for name, tensor in tensors.items():
        full = whole(tensor)
        for part, value in (dict(pieces.apart(name, full)) or {name: full}).items():
            place = pieces.places.get(part, part)
            if place not in seen:
                result[part] = value
            seen.add(place)
    return result


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
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    mesh = expert_mesh(**(mesh or {"num_experts": 4}))
    parallelize(layer, mesh, dense="ddp")
    x, g = tokens_of(counts, dtype)
    x, g = x.split(counts)[rank].clone(), g.split(counts)[rank]
    groups = groups_by_mesh([{"params": list(layer.parameters())}])
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    pointers, padding = [_local(p).data_ptr() for p in layer.parameters()], padding_of(layer)
    made = len(dist.distributed_c10d._world.pg_names)
    assert kind != "modules" or sum(tensor.numel() for tensor in padding) > 0
    results = []
    for plan in plans:
        _reset(layer, optimizer, start)
        x = x.detach().requires_grad_()
        for _ in range(backwards):
            y = layer(x, plan=ExecutionPlan(**plan), context=context_for(only, layer))
            ((y * g).sum() / backwards).backward()
        results.append(collect(layer, x, y, optimizer, norm, 1 / len(counts)))
        assert not any(tensor.any() for tensor in padding), plan
    assert made == len(dist.distributed_c10d._world.pg_names), "a plan made a process group"
    moved = pointers != [_local(p).data_ptr() for p in layer.parameters()]
    return results, moved


def padding_of(layer):
    """Views of what in the rows of unlike experts is no expert's."""
    pieces, found = Pieces(layer), []
    for stacked in {piece.stacked for piece in pieces.places.values()}:
        local = layer.get_parameter(stacked) if stacked in dict(layer.named_parameters()) else None
        if local is None:
            continue
        ends = {}
        for name, part in pieces.apart(stacked, local.detach()):
            expert, end = pieces.places[name].expert, pieces.places[name].start + part.numel()
            ends[expert] = max(ends.get(expert, 0), end)
        rows = local.detach().to_local()
        first = layer.experts._held.start
        found += [row[ends.get(first + i, 0) :] for i, row in enumerate(rows)]
    return found


def _local(p):
    return p.detach().to_local() if hasattr(p, "to_local") else p


@torch.no_grad()
def _reset(layer, optimizer, start):
    """The layer as it was before the step of another plan."""
    optimizer.state.clear()
    optimizer.zero_grad()
    layer.load_state_dict(start)


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
