"""Which r is best for how many tokens.

python -m benchmarks.parallel.r_tokens [--experts 4] [--backward]
"""

from __future__ import annotations

import argparse

import torch

from flexpert import MoE, MoEConfig, RoutingContext
from flexpert.emulate import Cluster
from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize

from .timing import interleaved, record

TOKENS = (16, 64, 256, 512, 1024, 2048, 4096)
D, F = 256, 1024


def on_rank(experts: int, backward: bool, repeats: int) -> list[dict[str, object]]:
    """All plans for each number of tokens, in turns."""
    mesh = expert_mesh(experts)
    torch.manual_seed(0)
    options = {"router": "hash", "capacity_factor": 1.0}
    layer = MoE(MoEConfig(model_dim=D, hidden_dim=F, num_experts=experts, **options))
    parallelize(layer, mesh, verify=False)
    rows: list[dict[str, object]] = []
    for tokens in TOKENS:
        x = torch.randn(tokens, D, requires_grad=backward)
        context = RoutingContext(token_ids=torch.arange(tokens))  # nearly equal rows per expert

        def call(r: int, x=x, context=context) -> None:
            with torch.set_grad_enabled(backward):
                y = layer(x, context=context, plan=ExecutionPlan(r=r, capacity="padded"))
            if backward:
                y.sum().backward()
                layer.zero_grad(set_to_none=True)

        plans = {str(r): (lambda r=r: call(r)) for r in mesh.legal_r}
        for r, figures in interleaved(plans, repeats, apart=True).items():
            rows.append({"experts": experts, "tokens": tokens, "r": int(r), **figures})
    return rows


def main() -> None:
    """Measure on 4 nodes of 2 ranks and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--bandwidth", default="200mbit")
    parser.add_argument("--latency", default="500us")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with Cluster(nodes=4, ranks=2, bandwidth=options.bandwidth, latency=options.latency) as cluster:
        rows = cluster.run(on_rank, options.experts, options.backward, options.repeats, timeout=1200)[0]
        mode = cluster.mode
    every_r = sorted({row["r"] for row in rows})
    table = []
    for tokens in TOKENS:
        times = {row["r"]: row["median_ms"] for row in rows if row["tokens"] == tokens}
        best = min(times, key=times.get)
        cells = [f"**{times[r]:.1f}**" if r == best else f"{times[r]:.1f}" for r in every_r]
        table.append([str(tokens), *cells, f"{max(times.values()) / times[best]:.1f}"])
    way = "forward + backward" if options.backward else "forward"
    least, most = (f(row["compute_ms"] for row in rows) for f in (min, max))
    words = (
        f"{options.experts} experts of {D} x {F} (2 MiB in fp32) on 4 nodes of 2 ranks, {options.bandwidth} "
        f"and {options.latency} one way ({mode}), {way}: median milliseconds of {options.repeats}, the "
        f"slowest rank counts. Capacity factor 1, buffers of known size. The ranks share two cores; of a "
        f"call, computing the experts takes {least:.1f} "
        f"to {most:.1f} ms."
    )
    name = f"r_tokens_{options.experts}{'_backward' if options.backward else ''}"
    header = ["tokens per rank", *(f"r = {r}" for r in every_r), "worst / best"]
    record(name, words, header, table, rows)


if __name__ == "__main__":
    main()
