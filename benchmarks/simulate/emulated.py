"""The simulator against emulated clusters that were calibrated and measured.

    python -m benchmarks.tune.predict
    python -m benchmarks.simulate.emulated

Takes the machines and the times of `benchmarks.tune.predict` and simulates the same layers under the same
plans on clusters of these machines. Loads that are not even are left out: their rows are not in the file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.tune.predict import CLUSTERS, LAYERS, LOADS, kendall
from flexpert.core.plan import ExecutionPlan
from flexpert.simulate import Cluster
from flexpert.simulate.paper.rows import seconds_of_layer
from flexpert.tune import LayerShape, Machine, Workload

RESULTS = Path(__file__).parent / "results"
MEASURED = Path(__file__).parents[1] / "tune" / "results" / "predict.json"


def simulated_ms(
    spec: dict[str, Any], machine: Machine, layer: dict[str, Any], tokens: int, plan: Any
) -> float:
    """Milliseconds of a layer, forward and backward, on a cluster."""
    nodes, local = spec["nodes"], spec["ranks"]
    ranks, experts = nodes * local, layer["experts"]
    cluster = Cluster(name="emulated", nodes=nodes, devices=local, machine=machine)
    shape = LayerShape(
        model_dim=layer["model_dim"],
        hidden_dim=layer["hidden_dim"],
        output_dim=layer["model_dim"],
        num_experts=experts,
        expert_ranks=min(ranks, experts),
        slices=max(1, ranks // experts),
        ranks_per_node=local,
    )
    return 1e3 * seconds_of_layer(cluster, shape, Workload.uniform(shape, tokens), plan)


def compare(data: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each even load of each layer and cluster."""
    rows = []
    for found in data["clusters"]:
        spec = next(s for s in CLUSTERS if _label(s) == found["cluster"])
        machine = Machine.from_dict(found["machine"])
        for layer in LAYERS:
            for tokens in (tokens for tokens, skew in LOADS if not skew):
                part = [
                    row
                    for row in data["rows"]
                    if row["cluster"] == found["cluster"]
                    and row["layer"].startswith(f"E {layer['experts']} ")
                    and row["load"] == f"{tokens} tokens"
                ]
                plans = [ExecutionPlan.from_dict(row["plan"]) for row in part]
                measured = [row["measured_ms"] for row in part]
                ours = [simulated_ms(spec, machine, layer, tokens, plan) for plan in plans]
                errors = [abs(a / b - 1) for a, b in zip(ours, measured, strict=True)]
                rows.append(
                    {
                        "cluster": found["cluster"],
                        "layer": part[0]["layer"],
                        "tokens": tokens,
                        "plans": len(plans),
                        "median_error": statistics.median(errors),
                        "largest_error": max(errors),
                        "tau": kendall(measured, ours),
                        "chosen_over_best": measured[ours.index(min(ours))] / min(measured),
                        "measured_ms": measured,
                        "simulated_ms": ours,
                    }
                )
    return rows


def _label(spec: dict[str, Any]) -> str:
    return f"{spec['nodes']} x {spec['ranks']}, {spec['bandwidth']}, {spec['latency']}"


def main() -> None:
    """Compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--output", type=Path, default=RESULTS / "emulated")
    options = parser.parse_args()
    rows = compare(json.loads(options.measured.read_text(encoding="utf-8")))
    command = shlex.join(["python", "-m", "benchmarks.simulate.emulated", *sys.argv[1:]])
    lines = [
        f"`{command}`",
        "",
        "Simulated times of a layer, forward and backward, beside those that `benchmarks.tune.predict` "
        "measured on emulated clusters, with the constants that `flexpert calibrate` found there.",
        "",
        "| cluster | layer | tokens | plans | median error | largest | tau | chosen / best |",
        "|" + "---|" * 8,
        *(
            f"| {row['cluster']} | {row['layer']} | {row['tokens']} | {row['plans']} "
            f"| {row['median_error']:.0%} | {row['largest_error']:.0%} | {row['tau']:.2f} "
            f"| {row['chosen_over_best']:.2f} |"
            for row in rows
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    options.output.parent.mkdir(exist_ok=True, parents=True)
    data = {"command": command, "rows": rows}
    options.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
