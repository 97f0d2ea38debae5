"""Interleaved timing, peak memory in child processes, and the facts of the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .contenders import Step
from .problem import Problem

Run = Callable[[], None]


def make_run(name: str, step: Step, problem: Problem, backward: bool) -> Run:
    """One repetition: forward alone without a graph, or forward and backward into fresh gradients."""

    def forward_only() -> None:
        with torch.no_grad():
            step()

    def both() -> None:
        for leaf in problem.leaves:
            leaf.grad = None
        out = step()
        if name != "dense":  # runs its backward itself
            out.backward(problem.grad_TD)

    return both if backward else forward_only


def interleave(runs: dict[str, Run], seconds: float, minimum: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turns for about `seconds`, after one turn to warm up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, end, turn = list(runs), time.perf_counter() + seconds, 0
    while turn < minimum or time.perf_counter() < end:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
        turn += 1
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median, minimum and quartile spread (percent of the median) of milliseconds."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {
        "median_ms": round(middle, 3),
        "min_ms": round(min(values), 3),
        "spread_percent": round(100 * (high - low) / middle, 1),
        "repetitions": len(values),
    }


def peak_mib(make: Callable[[], Run]) -> float:
    """Peak resident MiB of a forked child that builds and runs once; call before any parallel region."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            make()()
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = next(line for line in lines if line.startswith("VmHWM")).split()[1]
            os.write(write, peak.encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    text = os.read(read, 64).decode()
    os.close(read)
    os.waitpid(child, 0)
    return round(int(text) / 1024, 1) if text else float("nan")


def machine_facts() -> dict[str, object]:
    """What a reader needs to compare the figures with another machine's."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "flags": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
