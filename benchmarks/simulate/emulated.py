"""The simulator against emulated clusters that were calibrated and measured.

    python -m benchmarks.tune.predict
    python -m benchmarks.simulate.emulated

Takes the machines and the times of `benchmarks.tune.predict` and simulates the same layers, with the same
rows on each rank, under the same plans on clusters of these machines.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.tune.accuracy import kendall, standard_error
from benchmarks.tune.loads import CLUSTERS, LAYERS, LOADS, cluster_name, layer_name, load_name, on_cluster
from flexpert.core.plan import ExecutionPlan
from flexpert.simulate import Cluster
from flexpert.simulate.paper.rows import seconds_of_layer
from flexpert.tune import Machine

RESULTS = Path(__file__).parent / "results"
MEASURED = Path(__file__).parents[1] / "tune" / "results" / "predict.json"


def compare(data: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each load of each layer and cluster."""
    found = []
    for calibrated in data["clusters"]:
        cluster = next(c for c in CLUSTERS if cluster_name(c) == calibrated["cluster"])
        machine = Machine.from_dict(calibrated["machine"])
        rows = [row for row in data["rows"] if row["cluster"] == calibrated["cluster"]]
        for settings in LAYERS:
            for tokens, skew in LOADS[: settings.get("loads")]:
                found.append(compare_load(cluster, machine, settings, tokens, skew, rows))
    return found


def compare_load(
    cluster: dict[str, Any],
    machine: Machine,
    settings: dict[str, Any],
    tokens: int,
    skew: float,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """One load of a layer: milliseconds of every plan, measured, simulated and by the cost model."""
    shape, workload = on_cluster(settings, cluster, tokens, skew)
    names = layer_name(shape), load_name(tokens, skew)
    part = [row for row in rows if (row["layer"], row["load"]) == names]
    simulated = Cluster(name="emulated", nodes=cluster["nodes"], devices=cluster["ranks"], machine=machine)
    plans = [ExecutionPlan.from_dict(row["plan"]) for row in part]
    ours = [1e3 * seconds_of_layer(simulated, shape, workload, plan) for plan in plans]
    measured = [row["measured_ms"] for row in part]
    errors = [abs(a / b - 1) for a, b in zip(ours, measured, strict=True)]
    least = [standard_error(row["times_ms"]) for row in part]
    return {
        "cluster": cluster_name(cluster),
        "layer": names[0],
        "load": names[1],
        "plans": len(plans),
        "errors": errors,
        "tau": kendall(measured, ours),
        "tau_told_apart": kendall(measured, ours, least),
        "tau_of_model": kendall([row["predicted_ms"] for row in part], ours),
        "chosen_over_best": measured[ours.index(min(ours))] / min(measured),
        "measured_ms": measured,
        "simulated_ms": ours,
    }


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    """The table, as Markdown."""
    errors = [error for row in rows for error in row["errors"]]
    means = {name: statistics.mean(row[name] for row in rows) for name in ("tau", "tau_told_apart")}
    lines = [
        f"`{command}`",
        "",
        "Simulated times of a layer, forward and backward, beside those that `benchmarks.tune.predict` "
        "measured on emulated clusters, with the constants that `flexpert calibrate` found there. "
        f"{len(errors)} plans in {len(rows)} loads: median error {statistics.median(errors):.0%}; Kendall's "
        f"tau of the plans of a load, mean: {means['tau']:.2f}, of pairs that measurements tell apart: "
        f"{means['tau_told_apart']:.2f}. Tau with model: between the simulator and the tuner's cost model.",
        "",
        "| cluster | layer | load | plans | median error | largest | tau | tau, told apart | tau with model "
        "| chosen / best |",
        "|" + "---|" * 10,
        *(
            f"| {row['cluster']} | {row['layer']} | {row['load']} | {row['plans']} "
            f"| {statistics.median(row['errors']):.0%} | {max(row['errors']):.0%} | {row['tau']:.2f} "
            f"| {row['tau_told_apart']:.2f} | {row['tau_of_model']:.2f} | {row['chosen_over_best']:.2f} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--output", type=Path, default=RESULTS / "emulated")
    options = parser.parse_args()
    rows = compare(json.loads(options.measured.read_text(encoding="utf-8")))
    command = shlex.join(["python", "-m", "benchmarks.simulate.emulated", *sys.argv[1:]])
    text = text_of(rows, command)
    print(text, flush=True)
    options.output.parent.mkdir(exist_ok=True, parents=True)
    data = {"command": command, "rows": rows}
    options.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
