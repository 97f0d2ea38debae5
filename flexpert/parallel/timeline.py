"""When communication and computation of this rank ran, to see how much of one the other hides.

    with record_timeline() as timeline:
        y = moe(x)
    timeline.overlap_seconds()
    timeline.to_chrome("step.json")  # for ui.perfetto.dev or chrome://tracing

Collectives are recorded by themselves, from their issue to their completion; computation where it is marked
with `span`. Nothing is recorded, at no cost, outside of the `with`. On CUDA a collective counts as complete
when the host has waited for it, and times of the host say little about streams: use PyTorch's profiler there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Literal

Kind = Literal["compute", "communication"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Event:
    """What ran from `begin` to `end` (seconds of the monotonic clock); `chunk` of a pipeline, if any."""

    name: str
    kind: Kind
    begin: float
    end: float
    chunk: int | None = None


@dataclass
class Timeline:
    """Events of one rank in order of their end."""

    events: list[Event] = field(default_factory=list)

    def begin(self, name: str, kind: Kind, chunk: int | None = None) -> Callable[[], None]:
        """Begin an event now; the result ends it, from any thread, the first time it is called."""
        begin = time.perf_counter()
        permits = [None]  # taken by the first call alone: a pop is atomic

        def end() -> None:
            now = time.perf_counter()
            try:
                permits.pop()
            except IndexError:
                return
            self.events.append(Event(name, kind, begin, now, chunk))

        return end

    @contextmanager
    def span(self, name: str, chunk: int | None = None) -> Iterator[None]:
        """Record what runs inside the `with` as computation."""
        end = self.begin(name, "compute", chunk)
        try:
            yield
        finally:
            end()

    def seconds(self, kind: Kind) -> float:
        """Time in which at least one event of the kind ran."""
        return sum(end - begin for begin, end in self._union(kind))

    def overlap_seconds(self) -> float:
        """Time in which both communication and computation ran."""
        total, communication = 0.0, self._union("communication")
        for begin, end in self._union("compute"):
            total += sum(max(min(end, e) - max(begin, b), 0.0) for b, e in communication)
        return total

    def _union(self, kind: Kind) -> list[Interval]:
        """Disjoint intervals in which events of a kind ran, in order."""
        merged: list[Interval] = []
        for begin, end in sorted((event.begin, event.end) for event in self.events if event.kind == kind):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        return merged

    def to_chrome(self, path: str | PathLike[str], rank: int = 0) -> None:
        """Write the events as JSON of Chrome's trace format, a process per rank and a row per kind.

        Events of one kind that overlap are in rows of their own. Times are in microseconds from the first
        event.

        Raises:
            OSError: the file cannot be written.
        """
        start = min((event.begin for event in self.events), default=0.0)
        write_chrome(path, self.chrome_entries(rank, start))

    def chrome_entries(self, rank: int, start: float) -> list[dict[str, object]]:
        """The events in that format, as plain data; times from `start` on."""
        rows: dict[str, list[float]] = {"compute": [], "communication": []}
        entries: list[dict[str, object]] = []
        for event in sorted(self.events, key=lambda event: event.begin):
            ends = rows[event.kind]
            row = next((i for i, end in enumerate(ends) if end <= event.begin), len(ends))
            ends[row : row + 1] = [event.end]
            entry = {
                "name": event.name,
                "cat": event.kind,
                "ph": "X",
                "ts": (event.begin - start) * 1e6,
                "dur": (event.end - event.begin) * 1e6,
                "pid": rank,
                "tid": f"{event.kind} {row}",
            }
            entries.append(entry if event.chunk is None else {**entry, "args": {"chunk": event.chunk}})
        return entries


def write_chrome(path: str | PathLike[str], entries: list[dict[str, object]]) -> None:
    """Write entries of one or several ranks as a trace.

    Raises:
        OSError: the file cannot be written.
    """
    Path(path).write_text(json.dumps({"traceEvents": entries}), encoding="utf-8")


_active: Timeline | None = None


def active_timeline() -> Timeline | None:
    """The timeline that records now; None if none does."""
    return _active


@contextmanager
def record_timeline() -> Iterator[Timeline]:
    """Record this rank's collectives and spans inside the `with`; an inner `with` takes over."""
    global _active  # noqa: PLW0603 - what is recorded crosses all layers of the model
    previous, _active = _active, Timeline()
    try:
        yield _active
    finally:
        _active = previous
