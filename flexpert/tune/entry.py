"""What is known of one bucket: a search among plans, then a race of its winner's kernels, then a watch."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan

from .candidate import Candidate
from .drift import BAND, Drift
from .kernels import KernelRace
from .limits import Limits
from .race import LEAST, Race
from .search import Search
from .workload import LayerShape


@dataclass
class Entry:
    """One bucket, from its first trial to the watch over its winner; see `Entry.begin`.

    Which r, degree, algorithm and capacity mode is best is searched with the usual kernel. Then the winner
    runs with each other kernel too: the usual one stays unless another is faster beyond the interval of
    confidence.

    Attributes:
        search: among plans, with its measurements.
        limits: of the search and the race together.
        kernels: others than the usual one that are to be tried; none on one rank, where they are plans.
        race: of the winner with its kernels, once the search is over; None before, and without kernels.
        retuned: how often the winner's time left its band and the search began anew.
        updated: when it last changed, seconds since 1970.
    """

    search: Search
    limits: Limits = field(default_factory=Limits)
    kernels: tuple[str, ...] = ()
    race: KernelRace | None = None
    retuned: int = 0
    updated: float = 0.0
    _drift: Drift | None = field(default=None, init=False, repr=False)

    @classmethod
    def begin(
        cls,
        shape: LayerShape,
        candidates: Sequence[Candidate],
        limits: Limits | None = None,
        hints: Sequence[ExecutionPlan] = (),
        first: ExecutionPlan | None = None,
        kernels: Sequence[str] = (),
    ) -> Entry:
        """That of a bucket that was never met.

        Args:
            shape: of the layer; on one rank plans are few and differ little, so they race.
            candidates, hints, first: as in `Search`.
            limits: of all its trials; as many as every other kernel needs at least are kept from the search.
            kernels: others than the usual one that the layer can run.
        """
        limits = Limits() if limits is None else limits
        kept = min(LEAST * len(kernels), limits.trials // 3)
        search = (Race if shape.world == 1 else Search)(
            candidates, dataclasses.replace(limits, trials=limits.trials - kept), hints, first
        )
        entry = cls(search, limits, tuple(kernels))
        entry._touch()
        entry._go_on()  # one plan alone leaves nothing to search
        return entry

    @property
    def active(self) -> Search:
        """What trials are for now, or were for last."""
        return self.search if self.race is None else self.race

    @property
    def plan(self) -> ExecutionPlan:
        """The best plan known."""
        return self.active.plan

    @property
    def predicted(self) -> float:
        """Seconds that the model predicts for the first choice."""
        return self.search.candidates[0].predicted

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be tried."""
        return self.active.settled

    @property
    def uneasy(self) -> bool:
        """Whether the winner's last times were unlike those before."""
        return self._drift is not None and self._drift.uneasy

    @property
    def trials(self) -> int:
        """Measurements of others than the best plan known."""
        return self.search.standing.trials + (0 if self.race is None else self.race.standing.trials)

    def next(self, context: int = 0) -> ExecutionPlan | None:
        """The plan to try now; None: run the best one known."""
        return self.active.next(context)

    def record(self, plan: ExecutionPlan, seconds: float, context: int = 0, band: float = BAND) -> None:
        """Add the time of a step with a plan: to what is being searched, or to the watch over the winner.

        Args:
            plan: that ran.
            seconds: of the step.
            context: as in `Search.record`.
            band: relative change of the winner's time after which the search begins anew.
        """
        if self.settled:
            self._watch(seconds, context, band)
            return
        self.active.record(plan, seconds, context)
        self._go_on()
        self._touch()

    def why(self) -> str:
        """Why the best plan is the best, in a sentence."""
        if self.race is None:
            return self.search.why()
        return f"{self.search.why()}. Its kernel: {self.race.why()}"

    def spare(self, kernels: Collection[str]) -> None:
        """Leave out kernels that are known to bring nothing, if none has been tried here yet."""
        fewer = tuple(kernel for kernel in self.kernels if kernel not in kernels)
        if len(fewer) < len(self.kernels) and (self.race is None or not self.race.standing.trials):
            self.kernels, self.race = fewer, None
            self._go_on()

    def lost(self) -> set[str]:
        """Kernels that are known to bring nothing here."""
        return set() if self.race is None else self.race.lost()

    def rank(self) -> tuple[bool, float, int, str]:
        """Of two entries for one key the greater is kept: settled before not, then the newer one."""
        return self.settled, self.updated, len(self.search.samples), json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what follows from it for a reader: winner, times and the reason."""
        data = {
            "winner": self.plan.to_dict(),
            "settled": self.settled,
            "why": self.why(),
            "retuned": self.retuned,
            "updated": self.updated,
            **_measured(self.search),
            "hints": [plan.to_dict() for plan in self.search.hints],
        }
        if self.kernels:
            data["kernels"] = list(self.kernels)
        if self.race is not None:
            data["race"] = _measured(self.race)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], shape: LayerShape, limits: Limits | None = None) -> Entry:
        """An entry from plain data; only what cannot be derived is read.

        Raises:
            ConfigError: a sample of no candidate, a value that is no number, or a plan that cannot be.
        """
        found = _candidates(data)
        hints = [ExecutionPlan.from_dict(plan) for plan in data["hints"]]
        kernels = [str(name) for name in data.get("kernels", ())]
        entry = cls.begin(shape, found, limits, hints, found[0].plan, kernels)
        entry.retuned, entry.updated = int(data["retuned"]), _number(data["updated"])
        _replay(entry.search, found, data["samples"])
        entry._go_on()
        if entry.race is not None and "race" in data:
            found = _candidates(data["race"])
            if found[0] == entry.race.candidates[0]:  # else under other limits another plan won
                _replay(entry.race, found, data["race"]["samples"])
        return entry

    def _go_on(self) -> None:
        """Let the race begin when the search is over and a trial of each kernel is left."""
        left = self.limits.trials - self.search.standing.trials
        if self.race is not None or not self.kernels or left < LEAST or not self.search.settled:
            return
        usual = next(c for c in self.search.candidates if c.plan == self.search.plan)
        self.race = KernelRace.of(usual, self.kernels, dataclasses.replace(self.limits, trials=left))

    def _watch(self, seconds: float, context: int, band: float) -> None:
        """Begin anew, with the winner as the first choice, when its time has left the band."""
        if self._drift is None:
            self._drift = Drift(band)
        if self._drift.add(seconds, context):
            search = self.search
            self.search = type(search)(search.candidates, search.limits, [search.plan], first=search.plan)
            self.race = self._drift = None
            self.retuned += 1
            self._touch()

    def _touch(self) -> None:
        self.updated = round(time.time(), 3)


def _measured(search: Search) -> dict[str, Any]:
    times: dict[int, list[float]] = {}
    for sample in search.samples:
        times.setdefault(sample.candidate, []).append(sample.seconds)
    return {
        "candidates": [
            {"plan": c.plan.to_dict(), "predicted": c.predicted, "seconds": times.get(i, [])}
            for i, c in enumerate(search.candidates)
        ],
        "samples": [[s.candidate, s.seconds, s.context] for s in search.samples],
    }


def _candidates(data: Mapping[str, Any]) -> list[Candidate]:
    return [
        Candidate(ExecutionPlan.from_dict(c["plan"]), _number(c["predicted"])) for c in data["candidates"]
    ]


def _replay(search: Search, found: Sequence[Candidate], samples: Any) -> None:
    """Let a search measure again what it had measured."""
    for place, seconds, context in samples:
        if not 0 <= place < len(found):
            raise ConfigError(f"a sample of candidate {place!r} of {len(found)}")
        search.record(found[place].plan, _number(seconds), int(context))


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{value!r} is no number")
    if not math.isfinite(value):
        raise ConfigError(f"{value!r} is not finite")
    return float(value)
