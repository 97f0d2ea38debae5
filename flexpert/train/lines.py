"""The lines of metrics of a run, and the time that it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flexpert.monitor.metrics import MetricsWriter, describe_routing

from .one_rank import OneRank
from .stragglers import Stragglers
from .task import StepResult, Task

Report = Callable[[dict[str, Any]], None]


class Clock:
    """Seconds of a run, from now on.

    Args:
        before: seconds of its earlier parts.
    """

    def __init__(self, before: float) -> None:
        self._origin = time.perf_counter() - before

    def seconds(self) -> float:
        """All seconds until now."""
        return time.perf_counter() - self._origin


class MetricsLines:
    """Writes a line of metrics of the steps since the line before; every rank calls it.

    Args:
        task: what is trained.
        ranks: that train together.
        clock: of the run.
        start, total: steps done so far, and of the whole run.
        writer: gets each line; None on other ranks than 0, which also report nothing.
        report: called with each line, for a person to see.
    """

    def __init__(
        self,
        task: Task,
        ranks: OneRank,
        clock: Clock,
        start: int,
        total: int,
        writer: MetricsWriter | None,
        report: Report,
    ) -> None:
        self._task, self._ranks, self._clock, self._total = task, ranks, clock, total
        self._writer, self._report = writer, report
        self._done, self._seconds = start, clock.seconds()

    def add(self, done: int, result: StepResult, lr: float, stragglers: Stragglers) -> None:
        """The line after so many steps, with the result of the last one on this rank."""
        seconds, steps = self._clock.seconds(), done - self._done
        tokens_per_second = self._task.tokens_per_step * steps / (seconds - self._seconds)
        slow = stragglers.figures()
        with stragglers.paused():
            whole, traffic = self._ranks.figures(result), self._ranks.traffic(steps)
            for plan in traffic.get("plans", {}).values():
                plan["tokens_per_second"] = round(self._task.tokens_per_step / plan.pop("seconds"), 1)
            line = {
                "step": done,
                "steps": self._total,
                "seconds": round(seconds, 3),
                "lr": lr,
                "tokens_per_second": round(tokens_per_second, 1),
                "ranks": self._ranks.world.size,
                **traffic,
                **slow,
                "loss": float(whole.loss),
                **{name: float(value) for name, value in whole.metrics.items()},
                **describe_routing(whole.stats),
            }
            if self._writer is not None:
                self._writer.write(done, line)
                self._report(line)
        self._done, self._seconds = done, seconds
