"""Links that become slow while a layer trains: the tuner notices and finds what is best then.

    python -m benchmarks.tune.drift

Four ranks on two nodes train one layer under a tuner. When its search is over, the links between the nodes
are slowed, without a word to the ranks; they go on until the search that follows is over too. Then the static
plans take steps in turns with the winner's, for comparison.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flexpert import MoE, MoEConfig
from flexpert.bench.machine import machine_facts
from flexpert.emulate import Cluster
from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize
from flexpert.tune import Tuner, attach, cost_of
from flexpert.tune.calibrate import calibrate
from flexpert.tune.candidate import describe

RESULTS = Path(__file__).parent / "results"
NODES, RANKS, FAST, SLOW = 2, 2, "2gbit", "40mbit"
D, F, EXPERTS, TOKENS = 128, 512, 2, 96
LONGEST = 250  # steps of each half
STATIC = [ExecutionPlan(r=0), ExecutionPlan(r=1), ExecutionPlan(r=2), ExecutionPlan(r=2, degree=2)]


def on_rank(repeats: int) -> dict[str, Any]:
    """Train, tell when the links may be slowed, and train on."""
    machine = calibrate(model_dim=D, hidden_dim=F, ranks_per_node=RANKS)
    mesh = expert_mesh(EXPERTS, ranks_per_node=RANKS)
    torch.manual_seed(0)
    layer = MoE(MoEConfig(model_dim=D, hidden_dim=F, num_experts=EXPERTS))
    parallelize(layer, mesh)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(TOKENS, D)
    tuner = Tuner(cost_of(machine))
    attach(layer, tuner)

    def step(plan: ExecutionPlan | None = None) -> None:
        layer(x, plan=plan).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def until_settled(least: int, retuned: int) -> list[list[Any]]:
        rows = []
        for number in range(LONGEST):
            began = time.perf_counter()
            with tuner.step():
                step()
            rows.append([tuner.describe_plans(), 1e3 * (time.perf_counter() - began)])
            buckets = tuner.report()["buckets"]
            done = buckets and all(b["settled"] and b["retuned"] >= retuned for b in buckets)
            if done and number >= least:
                break
        return rows

    def static() -> dict[str, float]:
        found: dict[str, list[float]] = {describe(plan): [] for plan in STATIC}
        for turn in range(repeats + 1):
            for plan in STATIC:
                dist.barrier()
                began = time.perf_counter()
                step(plan)
                if turn:
                    found[describe(plan)].append(1e3 * (time.perf_counter() - began))
        return {name: statistics.median(values) for name, values in found.items()}

    halves = []
    for retuned in (0, 1):
        # Before the links change the winner's time must be known: it is what drift is told by.
        rows = until_settled(40, retuned)
        more = until_settled(20, retuned)
        halves.append({"steps": rows + more, "static_ms": static(), "report": tuner.report()})
        if not retuned:
            dist.barrier()
            if dist.get_rank() == 0:
                print("slow the links", flush=True)
            time.sleep(1.0)
    return json.loads(json.dumps({"halves": halves}))


def main() -> None:
    """Run it, and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "drift")
    options = parser.parse_args()
    facts = machine_facts()
    with Cluster(nodes=NODES, ranks=RANKS, bandwidth=FAST, latency="100us") as cluster:

        def echo(*line: Any) -> None:
            if b"slow the links" in line[-1]:
                for node in range(NODES):
                    cluster.set_rate(node, SLOW)

        found = cluster.run(on_rank, options.repeats, timeout=600, collective_timeout=600, echo=echo)[0]
        mode = cluster.mode
    text = text_of(found["halves"], mode)
    print(text, flush=True)
    options.output.parent.mkdir(exist_ok=True, parents=True)
    data = {"command": _command(), "facts": facts, **found}
    options.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")


def _command() -> str:
    return shlex.join(["python", "-m", "benchmarks.tune.drift", *sys.argv[1:]])


def text_of(halves: list[dict[str, Any]], mode: str) -> str:
    """The tables, as Markdown."""
    bucket = halves[1]["report"]["buckets"][0]
    old = halves[0]["steps"][-1][0]
    second = halves[1]["steps"]
    noticed = next((i for i, (plan, _) in enumerate(second) if plan != old), None)
    lines = [
        f"`{_command()}`",
        "",
        f"One layer, {EXPERTS} experts of {D} x {F}, {TOKENS} tokens a rank, on {NODES} nodes of {RANKS} "
        f"ranks ({mode}); the links between the nodes go from {FAST} to {SLOW} while it trains, and nobody "
        f"tells the ranks. The first step with another plan came {noticed} steps after the change; the "
        f"bucket was tuned anew {bucket['retuned']} times.",
        "",
        "| | " + " | ".join(halves[0]["static_ms"]) + " | tuned: plan at the end | its steps, ms |",
        "|---|" + "---|" * (len(STATIC) + 2),
    ]
    for name, half in zip((FAST, SLOW), halves, strict=True):
        last = half["steps"][-1][0]
        times = [seconds for plan, seconds in half["steps"][-15:] if plan == last]
        cells = [f"{ms:.1f}" for ms in half["static_ms"].values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {last} | {statistics.median(times):.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
