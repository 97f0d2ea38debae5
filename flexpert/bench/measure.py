"""Interleaved timing of implementations, and their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import count

import torch

from .implementations import (
    DECODE,
    FAILURES,
    OURS,
    REFERENCES,
    TRAINING,
    Implementation,
    Step,
    UnavailableError,
    first_line,
)
from .problem import Problem

Run = Callable[[], float]
DECODE_SECONDS = 0.01
OWN = {implementation.name for implementation in (*OURS, *REFERENCES)}


def make_run(implementation: Implementation, step: Step, problem: Problem, mode: str) -> Run:
    """One repetition, which returns its seconds.

    Forward and decode run without a graph; forward+backward ends in fresh gradients. A repetition of decode
    is the mean of as many steps as fill `DECODE_SECONDS`, after an untimed one: a step finds in the cache
    what fits there, whoever had the turn before.
    """

    def forward() -> None:
        with torch.no_grad():
            step()

    def training() -> None:
        for leaf in problem.leaves:
            leaf.grad = None
        out = step()
        if out.requires_grad:  # the dense products run their own backward
            out.backward(problem.grad_TD)

    body = training if mode == TRAINING else forward

    def run() -> float:
        with implementation.context():
            if mode == DECODE:
                body()
            start = time.perf_counter()
            for steps in count(1):
                body()
                seconds = time.perf_counter() - start
                if mode != DECODE or seconds >= DECODE_SECONDS:
                    return seconds / steps
        raise AssertionError("unreachable")

    return run


def prepare(implementation: Implementation, problem: Problem, mode: str) -> Run:
    """A run that has been warmed up.

    Raises:
        UnavailableError: it cannot run this problem; only of implementations that are not ours.
    """
    try:
        run = make_run(implementation, implementation.build(problem), problem, mode)
        run()
    except FAILURES as error:
        if implementation.name in OWN:
            raise
        raise UnavailableError(f"failed: {first_line(error)}") from error
    return run


def interleave(runs: dict[str, Run], seconds: float, minimum: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turns for about `seconds`, each at least `minimum` times.

    Who has used up more than an even share of the time sits out a turn, so that a slow one does not leave
    the others with few repetitions.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, begin = list(runs), time.perf_counter()
    for turn in count():
        elapsed = time.perf_counter() - begin
        late = [name for name in names if len(times[name]) < minimum]
        if not late and elapsed >= seconds:
            return times
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            if name in late or sum(times[name]) / 1e3 <= elapsed / len(names):
                times[name].append(runs[name]() * 1e3)
    raise AssertionError("unreachable")


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and quartile spread (percent of the median) of milliseconds."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {
        "median_ms": float(f"{middle:.5g}"),
        "min_ms": float(f"{min(values):.5g}"),
        "spread_percent": round(100 * (high - low) / max(middle, 1e-9), 1),
        "repetitions": len(values),
    }
