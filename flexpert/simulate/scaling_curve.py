"""How a model's best plan scales: the samples per second of smaller clusters of the same nodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flexpert.core.errors import ConfigError

from .cluster import Cluster
from .model import Model
from .recommend import recommend
from .traffic import Traffic


def throughput(
    model: Model, cluster: Cluster, batch: int, traffic: Traffic | None = None
) -> dict[int, float]:
    """Samples per second of the best plan, by number of ranks.

    The batch is in proportion to the nodes: 1, 2, 4, ... and all of the cluster's, without those that are
    unlike the others. Sizes on which no plan fits are left out.

    Args:
        model, cluster, batch, traffic: as of `recommend`; the batch is that of the whole cluster.
    """
    sizes = [2**i for i in range(cluster.nodes.bit_length()) if 2**i < cluster.nodes]
    found = {}
    for nodes in [*sizes, cluster.nodes]:
        part, samples = dataclasses.replace(cluster, nodes=nodes, unlike=()), batch * nodes // cluster.nodes
        try:
            best = recommend(model, part, samples, traffic=traffic, sensitivity=False).best
        except ConfigError:  # too little memory, or samples that so few ranks cannot share
            continue
        found[part.ranks] = samples / best.step.seconds
    return found


def draw(model: Model, cluster: Cluster, batch: int, path: Path, traffic: Traffic | None = None) -> None:
    """Draw `throughput` as PNG, beside the smallest cluster's in proportion to the ranks.

    Raises:
        ConfigError: no plan fits any size.
    """
    from . import plots

    found = throughput(model, cluster, batch, traffic)
    if not found:
        raise ConfigError(f"scaling: no plan of {model.name} fits {cluster.name} or a part of it")
    first = min(found)
    lines = {"best plan": found, "in proportion": {n: found[first] * n / first for n in found}}
    plots.curves(
        lines, path, x="ranks", y=f"{model.sample}s per second", title=f"{model.name} on {cluster.name}"
    )
