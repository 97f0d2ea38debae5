"""Finding the fastest of some plans from few, noisy measurements made while training goes on.

The state is the list of measurements and nothing else: what to try next and who leads are functions of it, so
that ranks with the same list agree, and a list that was saved goes on where it ended.

Letters: r as in `ExecutionPlan`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan

from .candidate import Candidate, describe
from .limits import Limits
from .standing import WINDOW, Sample, Standing, standing_of

ROUNDS = (1, 2, 4)  # measurements that a plan needs to survive each round of the halving
_PER_R = 2  # measurements of each r that the search over r looks at
DOUBT = 0.05  # a plan that may be faster than the winner by more is measured again while trials are left


class _WantedError(Exception):
    """The race needs another measurement of a candidate."""

    def __init__(self, candidate: int) -> None:
        self.candidate = candidate


class Search:
    """One search among plans for one class of workload.

    Trials are compared with measurements of the leader just before them, as clocks and machines drift; each
    trial is followed by the leader. First comes r: both ends (0 and S), and a ternary search between them, as
    time is convex in r (Tutel, arXiv 2206.03382, section 3.3). Then successive halving among the plans with
    the best r that the model holds for good: half of them leave in every round, those that are clearly slower
    at once. Where clocks were so noisy that another plan may still be far ahead, it is measured again.

    Args:
        candidates: all plans that can run, with predictions; those beyond `limits.worst` are left out.
        limits: of the search.
        hints: plans to try although the model would not: winners of similar workloads.
        first: what runs at first, in place of the model's best.

    Attributes:
        candidates: those that may run, best prediction first (after `first`).
        hints: those of them that may run.
        samples: measurements in order.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        limits: Limits | None = None,
        hints: Sequence[ExecutionPlan] = (),
        first: ExecutionPlan | None = None,
    ) -> None:
        if not candidates:
            raise ConfigError("a search needs at least one plan")
        self.limits = Limits() if limits is None else limits
        ordered = sorted(candidates, key=lambda c: (c.predicted, c.plan.encode()))
        bound = self.limits.worst * ordered[0].predicted
        self.candidates = [c for c in ordered if c.predicted <= bound]
        self.candidates.sort(key=lambda c: c.plan != first)
        self._place = {c.plan: i for i, c in enumerate(self.candidates)}
        self.hints = [plan for plan in hints if plan in self._place]
        self.samples: list[Sample] = []
        self._standing: Standing | None = None
        self._asked: tuple[Standing, int | None] | None = None

    def record(self, plan: ExecutionPlan, seconds: float, context: int = 0) -> None:
        """Add a measurement of one of the candidates; of another plan, or of a settled search, it is no use.

        Args:
            plan: that ran.
            seconds: that it took.
            context: a number for everything else that makes a difference; plans are compared within one.
        """
        if plan not in self._place or not 0 < seconds < math.inf or self.settled:
            return
        standing = self.standing
        self.samples.append(Sample(self._place[plan], seconds, context))
        tail = 0  # the leader's measurements without a trial among them: no more than a window is of use
        for sample in reversed(self.samples):
            if sample.candidate != standing.leader or sample.context != context:
                break
            tail += 1
        if tail > WINDOW:
            del self.samples[len(self.samples) - tail]
        self._standing = None

    def next(self, context: int = 0) -> ExecutionPlan | None:
        """The plan to try now; None: run the leader."""
        standing = self.standing
        wanted = self._wanted(standing)
        recent = self.samples[-1:] and self.samples[-1]
        ready = (
            recent
            and recent.context == context
            and recent.candidate == standing.leader
            and len(standing.window) >= 2
        )
        return self.candidates[wanted].plan if wanted is not None and ready else None

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be tried."""
        return self._wanted(self.standing) is None

    @property
    def plan(self) -> ExecutionPlan:
        """The best plan known: the leader while the search is on, the winner after it."""
        standing = self.standing
        return self.candidates[self._best(standing) if self.settled else standing.leader].plan

    @property
    def standing(self) -> Standing:
        """What the measurements say so far."""
        if self._standing is None:
            self._standing = standing_of(self.samples, self.limits.noise)
        return self._standing

    def errors(self) -> dict[ExecutionPlan, float]:
        """How many times as long as predicted each measured plan took, beside the first choice."""
        first = self.candidates[0].predicted
        return {
            self.candidates[i].plan: math.exp(self.standing.score(i)) * first / self.candidates[i].predicted
            for i in {*self.standing.scores, self.standing.leader}
        }

    def half_width(self, count: int) -> float:
        """Of the confidence interval of a score from so many measurements."""
        return self.limits.confidence * self.standing.error(count)

    def why(self) -> str:
        """Why the best plan is the best, in a sentence."""
        standing = self.standing
        best, first = self._best(standing), self.candidates[0].plan
        rivals = {i: statistics.median(s) for i, s in standing.scores.items() if i != best}
        if best:
            head = f"{_percent(-standing.score(best))} faster than the first choice ({describe(first)})"
        else:
            head = "the first choice stood" if rivals else "the first choice; nothing else was measured"
        if not rivals:
            return head
        nearest = min(rivals, key=lambda i: rivals[i])
        gap, width = rivals[nearest] - standing.score(best), self.half_width(len(standing.scores[nearest]))
        other = f"next is {describe(self.candidates[nearest].plan)}, {_percent(gap)} slower"
        return f"{head}; {other} ({'more' if gap > width else 'no more'} than the noise of {_percent(width)})"

    def _best(self, standing: Standing) -> int:
        """The leader, or who beats it by a standard error with as many measurements as a winner needs."""
        scores = {
            i: statistics.median(s) + standing.error(len(s))
            for i, s in standing.scores.items()
            if len(s) >= 2 and i != standing.leader
        }
        scores[standing.leader] = standing.level
        return min(scores, key=lambda i: (scores[i], i))

    def _wanted(self, standing: Standing) -> int | None:
        """The candidate to measure next; worked out once after each measurement."""
        if self._asked is None or self._asked[0] is not standing:
            self._asked = standing, self._missing(standing)
        return self._asked[1]

    def _missing(self, standing: Standing) -> int | None:
        if standing.trials >= self.limits.trials:
            return None
        try:
            self._race(standing)
        except _WantedError as wanted:
            return wanted.candidate
        return None

    def _race(self, standing: Standing) -> None:
        """The whole search; raises `_WantedError` at the first measurement that is missing."""
        first_of: dict[int, int] = {}
        for i, candidate in enumerate(self.candidates):
            first_of.setdefault(candidate.plan.r, i)
        values = {r: self._value(standing, i, _PER_R) for r, i in _ends(first_of).items()}
        between = sorted(r for r in first_of if r not in values)
        low, high = 0, len(between) - 1
        while low <= high:
            third = (high - low) // 3
            left, right = between[low + third], between[high - third]
            for r in (left, right):
                values[r] = self._value(standing, first_of[r], _PER_R)
            if left == right:
                break
            if values[left] <= values[right]:
                high -= third + 1
            else:
                low += third + 1
        best, *others = sorted(values, key=lambda r: values[r])
        rivals = [first_of[r] for r in others if values[r] <= values[best] + self.half_width(_PER_R)]
        self._halve(standing, [*self._pool(best), *rivals[:1], *(self._place[plan] for plan in self.hints)])
        self._settle_doubts(standing)

    def _pool(self, r: int) -> list[int]:
        """The model's favourites with this r."""
        of_r = [i for i, c in enumerate(self.candidates) if c.plan.r == r]
        bound = self.limits.near * min(self.candidates[i].predicted for i in of_r)
        return [i for i in of_r if self.candidates[i].predicted <= bound][: self.limits.pool]

    def _halve(self, standing: Standing, pool: list[int]) -> None:
        alive = list(dict.fromkeys(pool))
        for count in ROUNDS:
            values = {i: self._value(standing, i, count) for i in alive}
            alive = sorted(alive, key=lambda i: (values[i], i))[: math.ceil(len(alive) / 2)]
            alive = [i for i in alive if not self._clearly_slower(standing, i)]
            if len(alive) <= 1:
                break
        for i in alive:
            self._value(standing, i, ROUNDS[1])  # one measurement alone makes no winner

    def _settle_doubts(self, standing: Standing) -> None:
        """Measure again who may be fastest, if that may be far ahead of the leader."""
        least = {
            i: statistics.median(scores) - self.half_width(len(scores))
            for i, scores in standing.scores.items()
            if i != standing.leader
        }
        hopeful = min(least, key=lambda i: (least[i], i), default=standing.leader)
        if hopeful != standing.leader and least[hopeful] < standing.level - DOUBT:
            raise _WantedError(hopeful)

    def _value(self, standing: Standing, candidate: int, count: int) -> float:
        """The score from at least `count` measurements, fewer where they say enough."""
        if candidate == standing.leader:
            return standing.level
        scores = standing.scores.get(candidate, [])
        if len(scores) < count and not self._clearly_slower(standing, candidate):
            raise _WantedError(candidate)
        return statistics.median(scores)

    def _clearly_slower(self, standing: Standing, candidate: int) -> bool:
        scores = standing.scores.get(candidate, [])
        if candidate == standing.leader or not scores:
            return False
        return statistics.median(scores) - self.half_width(len(scores)) > standing.level


def _ends(first_of: dict[int, int]) -> dict[int, int]:
    """Data parallel, if it may run, and the least and the most slices at work."""
    sliced = [r for r in first_of if r > 0]
    return {r: i for r, i in first_of.items() if r == 0 or r in (min(sliced), max(sliced))}


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(abs(log_ratio)):.1f} %"
