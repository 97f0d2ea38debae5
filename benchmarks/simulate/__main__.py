"""Every row of the Tutel paper that the simulator reproduces, and pictures of scaling, plans and a step.

    python -m benchmarks.simulate

Writes a JSON and a Markdown file per row, the pictures, and a summary to benchmarks/simulate/results. It
predicts: no machine needs to be quiet for it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from flexpert.simulate import Cluster, JobPlan, parse_traffic, plots, simulate
from flexpert.simulate.models import parse_model
from flexpert.simulate.output import markdown_table, paper_table
from flexpert.simulate.paper import TABLES, reproduce
from flexpert.simulate.paper.all_to_all import all_to_all_times
from flexpert.simulate.paper.scaling import SCALES, STEPS, scaling_times
from flexpert.simulate.plan_map import draw

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.simulate"


def main() -> None:
    """Compute and write everything."""
    RESULTS.mkdir(exist_ok=True)
    summary = []
    for name in TABLES:
        table = reproduce(name)
        write(
            f"{name}.json",
            json.dumps({"command": f"flexpert simulate --paper {name} --json", **table}, indent=1),
        )
        write(f"{name}.md", f"`flexpert simulate --paper {name}`\n\n{paper_table(table)}")
        summary.append(summarize(table))
        print(f"{name}: {summary[-1][2]}, {summary[-1][3]} claims", file=sys.stderr)
    header = ["row", "what", "cells with a printed value: median and largest error", "claims that hold"]
    write("summary.md", "\n".join([f"`{COMMAND}`", "", *markdown_table(header, summary)]))
    pictures()


def summarize(table: dict[str, Any]) -> list[str]:
    """Row, title, errors and claims of a table."""
    errors = sorted(
        abs(row["error"]) for row in table["rows"] if row["error"] is not None and row["unit"] != "%"
    )
    points = sorted(
        abs(row["error"]) for row in table["rows"] if row["error"] is not None and row["unit"] == "%"
    )
    words = []
    if errors:
        words.append(f"{100 * errors[len(errors) // 2]:.0f} %, {100 * errors[-1]:.0f} % ({len(errors)})")
    if points:
        words.append(f"{points[len(points) // 2]:.0f} points, {points[-1]:.0f} points ({len(points)})")
    held = sum(claim["holds"] for claim in table["claims"])
    return [table["row"], table["title"], "; ".join(words), f"{held} of {len(table['claims'])}"]


def pictures() -> None:
    """Scaling of a layer, the two all-to-alls, the map of plans, and a step."""
    times = {ranks: scaling_times(ranks) for ranks in SCALES}
    plots.curves(
        {step: {ranks: 1e3 * times[ranks][step] for ranks in SCALES} for step in STEPS},
        RESULTS / "scaling.png",
        x="GPUs", y="ms", title="one layer, forward and backward (figure 14)",
    )  # fmt: skip
    exchanges = all_to_all_times().items()
    plots.curves(
        {f"{name}, {size} MiB": {n: 1e3 * t for n, t in line.items()} for (name, size), line in exchanges},
        RESULTS / "all_to_all.png",
        x="GPUs", y="ms", title="one all-to-all (figure 18)",
    )  # fmt: skip
    draw(Cluster.parse("a100-ndv4:nodes=8"), RESULTS / "plan_map.png")
    step = simulate(
        parse_model("layer:model_dim=4096,hidden_dim=8192,num_experts=32,top_k=2"),
        Cluster.parse("a100-ndv4:nodes=2,slow_rank=9@0.8"),
        16 * 16_384,
        JobPlan.parse("degree=4"),
        traffic=parse_traffic("zipf:skew=0.3"),
        watch=[0, 9],
    )
    plots.timeline(step, RESULTS / "timeline.png")


def write(name: str, text: str) -> None:
    """Write a file of the results."""
    (RESULTS / name).write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
