"""Cells of a table of the paper beside ours, and what both make of a single layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flexpert.core.plan import ExecutionPlan
from flexpert.simulate.clocks import Clocks
from flexpert.simulate.cluster import Cluster
from flexpert.simulate.durations import Durations
from flexpert.simulate.layer import LayerCall
from flexpert.tune import LayerShape, Workload
from flexpert.tune.presets import preset

DEVICES = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell.

    Attributes:
        name: of it.
        paper: its value there; None where it is drawn and not printed.
        ours: simulated.
        unit: "x", "ms", "GiB", "GPUs", or "%", whose error is a difference in points.
        note: why it differs.
    """

    name: str
    paper: float | None
    ours: float
    unit: str
    note: str = ""

    @property
    def error(self) -> float | None:
        """(ours - paper) / paper; for percentages ours - paper."""
        if self.paper is None:
            return None
        return self.ours - self.paper if self.unit == "%" else self.ours / self.paper - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the error."""
        return {**asdict(self), "error": self.error}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of a table, what the paper claims by them and whether that holds here, and remarks."""

    title: str
    rows: list[Row]
    claims: list[tuple[str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "title": self.title,
            "rows": [row.to_dict() for row in self.rows],
            "claims": [{"claim": claim, "holds": holds} for claim, holds in self.claims],
            "notes": self.notes,
        }


def testbed(ranks: int) -> Cluster:
    """So many of the paper's GPUs, eight to a node."""
    devices = min(ranks, DEVICES)
    return Cluster(name="a100-ndv4", nodes=ranks // devices, devices=devices, machine=preset("a100-ndv4"))


def layer_on(ranks: int, *, model_dim: int, hidden_dim: int, num_experts: int) -> LayerShape:
    """An MLP layer of the paper's tests, in fp32 (TF32 products), over so many ranks."""
    expert_ranks = min(ranks, num_experts)
    return LayerShape(
        model_dim=model_dim, hidden_dim=hidden_dim, output_dim=model_dim, num_experts=num_experts,
        expert_ranks=expert_ranks, slices=ranks // expert_ranks, ranks_per_node=min(ranks, DEVICES),
        verify=False,
    )  # fmt: skip


def full_capacity(shape: LayerShape, tokens: int, top_k: int, factor: float = 1.0) -> Workload:
    """Every place of every expert's buffer taken: the work of a padded layer, for any r."""
    capacity = max(1, int(top_k * factor * tokens / shape.num_experts))
    rows_PE = torch.full((1, shape.num_experts), capacity, dtype=torch.int64).expand(shape.ranks, -1)
    return Workload(rows_PE=rows_PE, tokens=tokens, capacity=capacity)


def parts_of_layer(
    cluster: Cluster, shape: LayerShape, workload: Workload, plan: ExecutionPlan
) -> dict[str, float]:
    """Seconds of the layer's phases, forward and backward; they add up to the time of both."""
    clocks = Clocks(cluster)
    call = LayerCall(Durations(cluster), shape, plan, workload)
    call.forward(clocks)
    call.backward(clocks)
    clocks.finish()
    return {name: float(value_W[0]) for name, value_W in clocks.path.items()}


def seconds_of_layer(cluster: Cluster, shape: LayerShape, workload: Workload, plan: ExecutionPlan) -> float:
    """Seconds of a layer, forward and backward."""
    return sum(parts_of_layer(cluster, shape, workload, plan).values())
