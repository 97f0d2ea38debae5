"""Times of ranks on an emulated cluster: interleaved, the slowest rank counts, medians."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
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
    calls: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1, *, apart: bool = False
) -> dict[str, dict[str, float]]:
    """Median, least and most milliseconds of each call, in turns; the slowest rank counts.

    "compute_ms" is the time in which experts were computed, on the rank where that took longest; with `apart`
    in turns of its own, since recording it costs small messages a tenth of their time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    compute: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warmup, repeats + apart):
        for name, call in calls.items():
            took, computing = _time(call, record=not apart or turn == repeats)
            if 0 <= turn < repeats:
                times[name].append(took)
            if turn == repeats or (turn >= 0 and not apart):
                compute[name].append(computing)
    return {
        name: {
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "max_ms": max(values),
            "compute_ms": statistics.median(compute[name]),
        }
        for name, values in times.items()
    }


def _time(call: Callable[[], Any], record: bool) -> tuple[float, float]:
    """Milliseconds of a call and of its experts, each on the rank where it takes longest."""
    dist.barrier()
    with record_timeline() if record else nullcontext() as timeline:
        began = time.perf_counter()
        call()
        took = time.perf_counter() - began
    computing = 0.0 if timeline is None else timeline.seconds("compute")
    slowest = torch.tensor([took, computing], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return 1e3 * float(slowest[0]), 1e3 * float(slowest[1])


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
