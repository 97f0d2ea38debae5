"""Which plan of one layer is best where: tokens of a rank across, parameters of an expert down."""

from __future__ import annotations

from pathlib import Path

from flexpert.tune import LayerShape, Workload
from flexpert.tune.cost import candidates

from .clocks import Clocks
from .cluster import Cluster
from .durations import Durations
from .layer import LayerCall

TOKENS = tuple(2**n for n in range(6, 17, 2))
HIDDEN = tuple(2**n for n in range(9, 16, 2))
WIDTH = 2048


def best_plans(cluster: Cluster, num_experts: int | None = None, dtype: str | None = None) -> list[list[str]]:
    """The fastest plan, forward and backward, for each of `HIDDEN` (rows) and `TOKENS` (columns).

    Args:
        cluster: its ranks share the experts.
        num_experts: of the layer, top-2; None for a quarter of the ranks, at least one.
        dtype: of rows and experts; None for the first that the machine has rates of.
    """
    experts = max(cluster.ranks // 4, 1) if num_experts is None else num_experts
    durations = Durations(cluster)
    table = []
    for hidden in HIDDEN:
        row = []
        for tokens in TOKENS:
            expert_ranks = min(experts, cluster.ranks)
            shape = LayerShape(
                model_dim=WIDTH, hidden_dim=hidden, output_dim=WIDTH, num_experts=experts,
                dtype=dtype or next(iter(cluster.machine.rates)), expert_ranks=expert_ranks,
                slices=cluster.ranks // expert_ranks, ranks_per_node=cluster.devices, verify=False,
            )  # fmt: skip
            workload = Workload.uniform(shape, 2 * tokens, tokens=tokens)
            times = {}
            for plan in candidates(shape):
                if plan.capacity == "padded" or plan.degree == 8:
                    continue  # equal rows: padding adds none, and the counts are what differs
                clocks, call = Clocks(cluster), LayerCall(durations, shape, plan, workload)
                call.forward(clocks)
                call.backward(clocks)
                name = "r=0" if plan.r == 0 else f"r={plan.r} d={plan.degree} {plan.algorithm}"
                times[name] = clocks.finish()
            row.append(min(times, key=times.__getitem__))
        table.append(row)
    return table


def draw(cluster: Cluster, path: Path) -> None:
    """Draw `best_plans` as PNG."""
    from . import plots

    parameters = [f"{2 * WIDTH * hidden / 1e6:.3g} M" for hidden in HIDDEN]
    title = f"fastest plan of one layer on {cluster.ranks} ranks of {cluster.name}"
    plots.plan_map(best_plans(cluster), TOKENS, parameters, path, title=title)
