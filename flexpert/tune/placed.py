"""Small layers on the ranks that run now, timed under a few plans: what constants are fitted to.

None of them is like a layer whose plans are to be predicted: one has next to no rows and products, one rows
but few products, one both.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from flexpert.core.config import MoEConfig
from flexpert.core.plan import ExecutionPlan
from flexpert.layer import MoE
from flexpert.parallel.mesh import ExpertMesh
from flexpert.parallel.parallelize import parallelize

from .fit import Observation
from .probes import Call, Stopwatch
from .workload import LayerShape, Workload

TOKENS = 512
PLANS = tuple(
    ExecutionPlan(degree=degree, algorithm=algorithm) for algorithm in ("linear", "2dh") for degree in (1, 4)
)


class PlacedLayer:
    """A layer with an expert on each rank of a mesh.

    Args:
        mesh: of all ranks, an expert on each.
        tokens, model_dim, hidden_dim: of it.
        dtype: of its rows and parameters.
    """

    def __init__(
        self, mesh: ExpertMesh, tokens: int, model_dim: int, hidden_dim: int, dtype: torch.dtype
    ) -> None:
        self.mesh = mesh
        config = MoEConfig(model_dim=model_dim, hidden_dim=hidden_dim, num_experts=mesh.num_experts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # one layer on all ranks
            self.layer: Any = parallelize(MoE(config).to(dtype), mesh)
        self.x = torch.randn(tokens, model_dim).to(dtype).requires_grad_()

    def step(self, plan: ExecutionPlan) -> Call:
        """A call that runs forward and backward, and returns when forward was done."""

        def call() -> float:
            y = self.layer(self.x, plan=plan)
            forward = time.perf_counter()
            y.backward(torch.ones_like(y))
            self.layer.zero_grad(set_to_none=True)
            return forward

        return call

    def load(self) -> tuple[LayerShape, Workload]:
        """The layer, and the rows of its ranks."""
        with torch.no_grad():
            counts = self.layer(self.x, return_info=True)[1].routing.counts_E.contiguous()
        rows_PE = torch.empty(self.mesh.whole.size, self.mesh.num_experts, dtype=torch.int64)
        self.mesh.whole.all_gather(rows_PE.view(-1), counts)
        return LayerShape.of(self.mesh, self.layer.experts), Workload(rows_PE=rows_PE, tokens=len(self.x))


def observe(
    mesh: ExpertMesh, watch: Stopwatch, dtype: torch.dtype, model_dim: int, hidden_dim: int
) -> list[Observation]:
    """Times of the layers, equal on all ranks.

    Args:
        mesh: of all ranks, an expert on each.
        watch: times their calls.
        dtype: that the experts compute in.
        model_dim, hidden_dim: of the expert that is measured.
    """
    found = []
    for tokens, model, hidden in (
        (2 * mesh.num_experts, 16, 16),
        (TOKENS, model_dim, max(1, hidden_dim // 16)),
        (TOKENS, model_dim, hidden_dim),
    ):
        layer = PlacedLayer(mesh, tokens, model, hidden, dtype)
        shape, workload = layer.load()
        plans = [plan for plan in PLANS if plan.algorithm == "linear" or _differs(shape)]
        for plan, (forward, total) in zip(
            plans, watch.laps([layer.step(plan) for plan in plans]), strict=True
        ):
            found.append(Observation(shape, workload, plan, forward, total))
    return found


def _differs(shape: LayerShape) -> bool:
    """Whether the hierarchical all-to-all is another than the linear one."""
    return shape.local_ranks not in (None, 1, shape.ranks)
