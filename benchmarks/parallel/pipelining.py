"""Pipelining degree over ratios of compute to communication.

python -m benchmarks.parallel.pipelining
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

from flexpert import MoE, MoEConfig, RoutingContext
from flexpert.emulate import Cluster
from flexpert.experts import ExpertBank
from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize
from flexpert.routers import build_router

from .timing import interleaved, record

DEGREES = (1, 2, 4, 8)
D, TOKENS = 256, 2048
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)


class SleepingExperts(ExpertBank):
    """Stands in for an accelerator: takes a time per row, and none of the processor's."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts=num_experts, model_dim=D, output_dim=D)
        self.scale = nn.Parameter(torch.ones(num_experts, 1))
        self.seconds_per_row = 0.0

    def layout(self) -> dict[str, Any]:
        """One number per expert."""
        from flexpert.core.layout import ParamLayout

        return {"scale": ParamLayout(slice_dim=None)}

    def rows(self, x_RD: Tensor, unit_N: Tensor, counts_E: Tensor, slot_E: Tensor | None = None) -> Tensor:
        """The rows as they are, later."""
        time.sleep(self.seconds_per_row * x_RD.shape[0])
        return x_RD * 1.0


def layer_of(kind: str, hidden: int) -> MoE:
    """A layer with experts that sleep or compute."""
    torch.manual_seed(0)
    experts = torch.distributed.get_world_size()
    config = MoEConfig(model_dim=D, hidden_dim=hidden, num_experts=experts, router="hash")
    if kind == "products":
        return MoE(config)
    return MoE(router=build_router(config), experts=SleepingExperts(experts))


def on_rank(kind: str, hidden: int, repeats: int) -> list[dict[str, object]]:
    """All degrees for each ratio, in turns; forward only."""
    mesh = expert_mesh(torch.distributed.get_world_size())
    layer = layer_of(kind, hidden)
    parallelize(layer, mesh, verify=False)
    x, context = torch.randn(TOKENS, D), RoutingContext(token_ids=torch.arange(TOKENS))

    def call(degree: int) -> None:
        with torch.no_grad():
            layer(x, context=context, plan=ExecutionPlan(degree=degree))

    plans = {str(degree): (lambda degree=degree: call(degree)) for degree in DEGREES}
    alone = interleaved({"1": plans["1"]}, repeats)["1"]
    communication = alone["median_ms"] - alone["compute_ms"]
    rows: list[dict[str, object]] = []
    for ratio in RATIOS if kind == "sleep" else (None,):
        if ratio is not None:
            layer.experts.seconds_per_row = ratio * communication / 1e3 / TOKENS
        figures = interleaved(plans, repeats)
        serial = figures["1"]
        communication_now = serial["median_ms"] - serial["compute_ms"]
        for degree, row in figures.items():
            least = min(communication_now, serial["compute_ms"])
            hidden_share = (serial["median_ms"] - row["median_ms"]) / max(least, 1e-9)
            rows.append(
                {
                    "kind": kind,
                    "ratio": round(serial["compute_ms"] / communication_now, 2),
                    "degree": int(degree),
                    **row,
                    "hidden_share": hidden_share,
                }
            )
    return rows


def main() -> None:
    """Measure on 4 nodes of one rank and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for bandwidth in ("100mbit", "200mbit"):
        with Cluster(nodes=4, ranks=1, bandwidth=bandwidth, latency="500us") as cluster:
            for kind, hidden in (("sleep", 0), ("products", 1024), ("products", 4096)):
                found = cluster.run(on_rank, kind, hidden or 8, options.repeats, timeout=1200)[0]
                rows += [{"bandwidth": bandwidth, **row} for row in found]
    table = []
    for start in range(0, len(rows), len(DEGREES)):
        part = rows[start : start + len(DEGREES)]
        times = [row["median_ms"] for row in part]
        best = min(part, key=lambda row: row["median_ms"])
        cells = [f"**{t:.0f}**" if t == min(times) else f"{t:.0f}" for t in times]
        facts = [part[0]["bandwidth"], part[0]["kind"], f"{part[0]['ratio']:.2f}"]
        table.append([*facts, *cells, f"{times[0] / min(times):.2f}x", f"{100 * best['hidden_share']:.0f} %"])
    words = (
        f"4 nodes of one rank, 500 us one way, {TOKENS} tokens of {D} per rank (2 MiB), forward: median "
        f"milliseconds of {options.repeats}, the slowest rank counts. 'sleep' stands in for an "
        f"accelerator: it "
        f"takes time and no processor; 'products' are real experts, whose ranks share two cores with gloo. "
        f"Hidden: the time gained over degree 1, as a share of the smaller of compute and communication."
    )
    header = [
        "link",
        "experts",
        "compute / communication",
        *(f"degree {d}" for d in DEGREES),
        "gain",
        "hidden",
    ]
    record("pipelining", words, header, table, rows)


if __name__ == "__main__":
    main()
