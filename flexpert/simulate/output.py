"""A simulated step as text, as a trace for Perfetto, and as a picture; rows of the paper as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexpert.parallel.mesh import mesh_shape
from flexpert.parallel.timeline import write_chrome

from .cluster import Cluster
from .job import JobPlan
from .model import Model
from .step import Step


def write_timeline(step: Step, trace: Path | None, picture: Path | None) -> list[str]:
    """Write the timeline of a step as a trace and as PNG, where a path is given; the paths."""
    if trace is not None:
        entries: list[dict[str, object]] = []
        for rank, timeline in step.timelines.items():
            entries += timeline.chrome_entries(rank, 0.0)
        partial = trace.with_name(trace.name + ".partial")
        write_chrome(partial, entries)
        partial.replace(trace)
    if picture is not None:
        from . import plots

        plots.timeline(step, picture)
    return [str(path) for path in (trace, picture) if path is not None]


def step_text(result: Mapping[str, Any]) -> str:
    """A step's figures in lines."""
    total, capacity = result["total_memory"], result["capacity"]
    plan = JobPlan.from_dict(result["plan"]).describe()
    lines = [
        f"{result['model']} ({result['params'] / 1e9:.3g} B parameters) on {result['ranks']} ranks of "
        f"{result['cluster']}, {result['batch']} {result['sample']}s, plan {plan}",
        f"step {seconds(result['seconds'])}, {result['samples_per_second']:.4g} {result['sample']}s/s, "
        f"{100 * result['utilization']:.1f} % of the products' rate",
        "phases on the critical path:",
    ]
    for name, value in sorted(result["parts"].items(), key=lambda item: -item[1]):
        if value > 0:
            mark = "  <- bottleneck" if name == result["bottleneck"] else ""
            lines.append(f"  {name:<14} {seconds(value):>10} {100 * value / result['seconds']:5.1f} %{mark}")
    lines.append(f"ranks wait for others {100 * result['waiting']:.1f} % of the step in the mean")
    if result["straggler"]:
        lines[-1] += f"; rank {result['rank']} waits least: it is slow, or has more to do"
    lines.append(f"memory of a rank: {size(total)}" + (f" of {size(capacity)}" if capacity else ""))
    for name, value in result["memory"].items():
        if value:
            lines.append(f"  {name:<20} {size(value):>10}")
    lines.append(
        f"a rank sends {size(result['bytes_inside'])} inside its node and {size(result['bytes_between'])} to "
        f"others for its experts, per pass"
    )
    if not result["fits"]:
        lines.append("It does not fit: see flexpert plan for plans that do.")
    lines += [f"written: {path}" for path in result["files"]]
    return "\n".join(lines)


def paper_table(result: Mapping[str, Any]) -> str:
    """Rows of the paper beside ours, as Markdown."""
    lines = [f"{result['row']}: {result['title']}", ""]
    lines += markdown_table(
        ["row", "paper", "ours", "error", "note"],
        [
            [row["name"], number(row["paper"]), number(row["ours"]), row_error(row), row["note"]]
            for row in result["rows"]
        ],
    )
    lines += ["", *(f"- {'holds' if c['holds'] else 'MISSED'}: {c['claim']}" for c in result["claims"])]
    return "\n".join([*lines, "", *result["notes"]])


def row_error(row: Mapping[str, Any]) -> str:
    """The error as text: relative, or the difference where the row is a percentage or a sign."""
    if row["error"] is None:
        return "-"
    return f"{row['error']:+.1f} points" if row["unit"] == "%" else f"{100 * row['error']:+.0f} %"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def number(value: float | None) -> str:
    """Four digits, or "-" for what was not published."""
    return "-" if value is None else f"{value:.4g}"


def seconds(value: float) -> str:
    """A time in a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value * 1e6:.3g} us"


def size(value: float) -> str:
    """Bytes in a unit that suits them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f} B"


def meshes(model: Model, cluster: Cluster, plan: JobPlan) -> dict[str, dict[str, int]]:
    """The factors of a plan's meshes: "dense", and "experts" where there are some."""
    found = {"dense": {"copies": cluster.ranks // plan.dense_shards, "shards": plan.dense_shards}}
    if model.num_experts:
        shape = mesh_shape(model.num_experts, cluster.ranks, plan.replicas, plan.slices)
        found["experts"] = dict(zip(("replica", "expert", "slice"), shape, strict=True))
    return found


def plan_words(result: Mapping[str, Any]) -> list[str]:
    """The best plan with all that it says, in lines."""
    plan, each = result["best"]["plan"], result["batch"] // result["ranks"]
    dense, experts = result["meshes"]["dense"], result["meshes"].get("experts")
    kind = "FSDP" if dense["copies"] == 1 else "DDP" if dense["shards"] == 1 else "FSDP, copied"
    if dense["copies"] == dense["shards"] == 1:
        kind = "one rank"
    lines = [f"dense layers: {dense['copies']} copies x {dense['shards']} shards ({kind})"]
    if experts:
        axes = " x ".join(f"{count} {axis}" for axis, count in experts.items())
        way = f"degree {plan['degree']}, {plan['algorithm']} all-to-all, {plan['capacity']}"
        lines.append(f"experts: mesh {axes}; r = {plan['r']}" + (f", {way}" if plan["r"] else ""))
    size = plan["micro_batch"] or each
    again = "with" if plan["checkpointing"] else "without"
    lines.append(
        f"a rank: {each // size} x {size} {result['sample']}s a step, {again} activation checkpointing"
    )
    return [f"  {line}" for line in lines]


def plan_text(result: Mapping[str, Any]) -> str:
    """Ranked plans, what does not fit, and what would change the answer, in lines."""
    best, budget = result["best"], result["budget"]
    lines = [
        f"{result['model']} on {result['ranks']} ranks of {result['cluster']}, {result['batch']} "
        f"{result['sample']}s a step: {result['considered']} plans, {result['num_refused']} do not fit "
        f"{size(budget) if budget else 'unknown memory'}",
        f"best: {best['describe']}",
        *plan_words(result),
        "",
    ]
    rows = [
        [
            str(place),
            seconds(choice["seconds"]),
            size(choice["total_memory"]),
            choice["bottleneck"],
            f"{100 * choice['parts'][choice['bottleneck']] / choice['seconds']:.0f} %",
            choice["describe"],
        ]
        for place, choice in enumerate(result["ranked"], 1)
    ]
    lines += markdown_table(["", "step", "memory", "bottleneck", "of the step", "plan"], rows)
    if result["refused"]:
        lines += ["", "does not fit:"]
        lines += [f"  {size(choice['total_memory'])}: {choice['describe']}" for choice in result["refused"]]
    if result["sensitivity"]:
        lines += ["", "what would change the answer:"]
    for name, change in result["sensitivity"].items():
        if not change["fits"]:
            lines.append(f"  {name}: nothing fits, the least is {size(change['least_memory'])}")
            continue
        answer = f"then {change['describe']}" if change["changes"] else "the same plan"
        lines.append(f"  {name}: {change['speed']:.2f} times the samples per second, {answer}")
    lines += [f"written: {path}" for path in result["files"]]
    return "\n".join(lines)
