"""Times of ranks on an emulated cluster: interleaved, the slowest rank counts, medians."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flexpert.bench.machine import machine_facts
from flexpert.parallel.timeline import record_timeline

RESULTS = Path(__file__).parent / "results"
# Set before any rank starts: fresh pages at every call would be measured instead (see `flexpert.emulate`).
Rows = list[dict[str, Any]]


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Median, least and most milliseconds of each call, in turns; the slowest rank counts.

    "compute_ms" is the time in which experts were computed, on the rank where that took longest.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    compute: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + warmup):
        for name, call in calls.items():
            dist.barrier()
            with record_timeline() as timeline:
                began = time.perf_counter()
                call()
                took = time.perf_counter() - began
            slowest = torch.tensor([took, timeline.seconds("compute")], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if repeat >= warmup:
                times[name].append(1e3 * float(slowest[0]))
                compute[name].append(1e3 * float(slowest[1]))
    return {
        name: {
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "max_ms": max(values),
            "compute_ms": statistics.median(compute[name]),
        }
        for name, values in times.items()
    }


def record(name: str, words: str, header: list[str], table: list[list[str]], rows: Rows) -> None:
    """Write rows as JSON, and a table with the command that was run as Markdown; print the table."""
    command = shlex.join(["python", "-m", f"benchmarks.parallel.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    RESULTS.mkdir(exist_ok=True)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(line) + " |" for line in table]
    text = f"`{command}`\n\n{words}\n\n" + "\n".join(lines) + "\n"
    data = {"command": command, "machine": machine_facts(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, flush=True)
