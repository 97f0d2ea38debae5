"""The clusters, layers and loads that `predict` measures, and `benchmarks.simulate.emulated` simulates."""

from __future__ import annotations

from typing import Any

import torch

from flexpert import MoE, MoEConfig
from flexpert.parallel.grid import RankGrid
from flexpert.parallel.mesh import mesh_shape
from flexpert.tune import LayerShape, Workload

CLUSTERS = (
    {"nodes": 4, "ranks": 2, "bandwidth": "200mbit", "latency": "500us"},
    {"nodes": 2, "ranks": 2, "bandwidth": "1gbit", "latency": "100us"},
    {"nodes": 2, "ranks": 4, "bandwidth": "500mbit", "latency": "200us"},
)
LAYERS: tuple[dict[str, Any], ...] = (
    {"experts": 4, "model_dim": 192, "hidden_dim": 768, "replicas": 1},
    {"experts": 8, "model_dim": 256, "hidden_dim": 512, "replicas": 1},
    # Not looked at while the model was made.
    {
        "experts": 8,
        "model_dim": 320,
        "hidden_dim": 320,
        "replicas": 1,
        "slices": 2,
        "expert": "glu",
        "loads": 2,
    },
)
# Tokens of a rank, and how far from even the router sends them.
LOADS = ((48, 0.0), (384, 2.0), (1280, 0.0))


def cluster_name(cluster: dict[str, Any]) -> str:
    """One of `CLUSTERS`, for tables."""
    return f"{cluster['nodes']} x {cluster['ranks']}, {cluster['bandwidth']}, {cluster['latency']}"


def layer_name(shape: LayerShape) -> str:
    """A layer on its ranks, for tables."""
    return f"E {shape.num_experts} S {shape.slices}{' gated' if shape.gated else ''}"


def load_name(tokens: int, skew: float) -> str:
    """A load, for tables."""
    return f"{tokens} tokens{', skewed' if skew else ''}"


def places_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What the mesh of one of `LAYERS` is asked for."""
    return {key: settings.get(key) for key in ("replicas", "slices")}


def layer_of(settings: dict[str, Any]) -> MoE:
    """One of `LAYERS`, whole, the same in every process."""
    torch.manual_seed(0)
    dims = {key: settings[key] for key in ("model_dim", "hidden_dim", "expert") if key in settings}
    return MoE(MoEConfig(num_experts=settings["experts"], **dims))


def tokens_of(rank: int, tokens: int, model_dim: int, skew: float) -> torch.Tensor:
    """The tokens of a rank (T, D)."""
    generator = torch.Generator().manual_seed(1)
    usual = torch.randn(model_dim, generator=generator)  # what skewed tokens have in common
    torch.manual_seed(2 + rank)
    return torch.randn(tokens, model_dim) + 0.1 * skew * usual


def on_cluster(
    settings: dict[str, Any], cluster: dict[str, Any], tokens: int, skew: float
) -> tuple[LayerShape, Workload]:
    """One of `LAYERS` on one of `CLUSTERS`, and the rows that its ranks have, without any rank."""
    layer, ranks = layer_of(settings), cluster["nodes"] * cluster["ranks"]
    replicas, expert_ranks, slices = mesh_shape(settings["experts"], ranks, **places_of(settings))
    grid = RankGrid(
        replicas=replicas, expert_ranks=expert_ranks, slices=slices, ranks_per_node=cluster["ranks"]
    )
    counts = []
    with torch.no_grad():
        for rank in range(ranks):
            x = tokens_of(rank, tokens, settings["model_dim"], skew)
            counts.append(layer(x, return_info=True)[1].routing.counts_E)
    return LayerShape.of(grid, layer.experts), Workload(rows_PE=torch.stack(counts), tokens=tokens)
