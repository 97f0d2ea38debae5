"""What a tuned run took, against the plans that would have been best, in hindsight.

A block is some steps of the tuned run in one phase; a round is some steps of each static plan in the same
phase, right after it. Blocks and rounds alternate, so that the machine's slow changes meet both alike.

- A step that takes more than twice the median of its plan and phase counts as twice it: a hiccup of the
  machine says nothing about plans. That holds for all steps.
- The least of many noisy averages is too small. So the best plan of a phase is chosen by one half of the
  rounds and its time taken from the other half, and the other way round; the mean of both is hindsight.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

CLIP = 2.0
LEAST = 6  # steps of a plan that only the tuned run took, for it to be compared


@dataclass(frozen=True)
class Sample:
    """One step: when, which plan, how long; `half` tells the rounds of a phase apart."""

    turn: int
    phase: int
    half: int
    plan: str
    seconds: float


def static_samples(found: dict[str, Any]) -> list[Sample]:
    """The steps of all rounds."""
    return [
        Sample(r["turn"], r["phase"], r["half"], plan, seconds)
        for r in found["rounds"]
        for plan, times in r["seconds"].items()
        for seconds in times
    ]


def tuned_samples(found: dict[str, Any]) -> list[Sample]:
    """The steps of all blocks."""
    return [
        Sample(b["turn"], b["phase"], b["half"], plan, seconds)
        for b in found["blocks"]
        for plan, seconds in zip(b["plans"], b["seconds"], strict=True)
    ]


class Hindsight:
    """Times of plans by phase.

    Args:
        found: what was measured: "blocks" and "rounds".
    """

    def __init__(self, found: dict[str, Any]) -> None:
        self.static, self.tuned = static_samples(found), tuned_samples(found)
        self.steps_of = defaultdict[int, int](int)  # of the tuned run in a phase
        together = defaultdict[tuple[int, str], list[float]](list)
        for sample in [*self.static, *self.tuned]:
            together[sample.phase, sample.plan].append(sample.seconds)
        self._most = {key: CLIP * statistics.median(times) for key, times in together.items()}
        known = {(s.phase, s.plan) for s in self.static}
        own = defaultdict[tuple[int, str], int](int)
        for sample in self.tuned:
            own[sample.phase, sample.plan] += (sample.phase, sample.plan) not in known
        self.compared = self.static + [s for s in self.tuned if own[s.phase, s.plan] >= LEAST]
        self.phases = sorted({s.phase for s in self.static})
        self.turns = sorted({s.turn for s in self.static})

    def clipped(self, sample: Sample) -> float:
        """Seconds of a step without what a hiccup added."""
        return min(sample.seconds, self._most[sample.phase, sample.plan])

    def times(self, phase: int, turns: Collection[int], halves: Sequence[int] = (0, 1)) -> dict[str, float]:
        """Mean seconds of a step of each plan that was compared."""
        found = defaultdict[str, list[float]](list)
        for sample in self.compared:
            if sample.phase == phase and sample.turn in turns and sample.half in halves:
                found[sample.plan].append(self.clipped(sample))
        return {plan: statistics.mean(times) for plan, times in found.items()}

    def best(self, phase: int, turns: Collection[int]) -> float:
        """Seconds of a step of the phase's best plan, chosen by other steps than those that tell its time."""
        found = []
        for chooser, teller in ((0, 1), (1, 0)):
            chosen = self.times(phase, self.turns, (chooser,))
            told = self.times(phase, turns, (teller,))
            found.append(told[min(told, key=lambda plan: chosen.get(plan, float("inf")))])
        return statistics.mean(found)

    def steps(self, phase: int, turns: Collection[int]) -> list[Sample]:
        """Of the tuned run."""
        return [s for s in self.tuned if s.phase == phase and s.turn in turns]

    def over(self, turns: Collection[int]) -> dict[str, Any]:
        """Seconds of the tuned run in these passes, of hindsight, and of each static plan."""
        best = tuned = tuner = 0.0
        static = defaultdict[str, float](float)
        for phase in self.phases:
            steps, times = self.steps(phase, turns), self.times(phase, turns)
            best += len(steps) * self.best(phase, turns)
            tuned += sum(map(self.clipped, steps))
            # What the same steps would take without a tuner: the plans that ran, at their static times.
            tuner += sum(self.clipped(s) - times.get(s.plan, self.clipped(s)) for s in steps)
            for plan in {s.plan for s in self.static}:
                static[plan] += len(steps) * times[plan]
        return {
            "steps": sum(len(self.steps(phase, turns)) for phase in self.phases),
            "hindsight": best,
            "tuned": tuned,
            "regret": tuned / best - 1,
            "of_the_tuner_itself": tuner / best,
            "static": dict(sorted(static.items(), key=lambda item: item[1])),
        }
