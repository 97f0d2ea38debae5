"""Which rank of a run is slow, at each line of metrics."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from flexpert.parallel import ExpertMesh, straggler_report
from flexpert.parallel.timers import PhaseTimers


class Stragglers:
    """The timers of the ranks' phases from one line of metrics to the next.

    All steps are timed, as one alone says little, and the ranks compare only when a line is due.

    Args:
        timers: of this rank, running; None where nothing is timed.
        mesh: the ranks that compare.
    """

    def __init__(self, timers: PhaseTimers | None = None, mesh: ExpertMesh | None = None) -> None:
        self._timers, self._mesh = timers, mesh

    def paused(self) -> AbstractContextManager[None]:
        """Around what is no part of a step, such as what rank 0 writes."""
        return nullcontext() if self._timers is None else self._timers.paused()

    def figures(self) -> dict[str, Any]:
        """Seconds of each rank by phase since the last call and, where one is slow, a sentence; all call it.

        Returns:
            "phase_seconds", and "straggler" where a rank is named; nothing where nothing is timed.
        """
        if self._timers is None or self._mesh is None:
            return {}
        report = straggler_report(self._timers.lap(), self._mesh)
        rounded = {name: [round(value, 4) for value in row] for name, row in report.seconds.items()}
        named = {} if report.rank is None else {"straggler": report.line}
        return {"phase_seconds": rounded, **named}
