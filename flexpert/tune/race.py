"""The search among few plans that differ little: the ways in which one rank can compute its experts."""

from __future__ import annotations

import math
import statistics

from flexpert.core.plan import ExecutionPlan

from .search import Search
from .standing import Standing, noise_of

TOLERANCE = 0.03  # a plan that is not slower than the best by more is good enough
LEAST_NOISE = 0.01  # relative error of one measurement that is assumed at least
WINDOW, READY = 9, 4  # of the leader's last measurements: at most, and before the first trial
LEAST, MOST = 2, 8  # measurements of one plan before it is out, and after which the median decides


class Race(Search):
    """Every candidate against the leader, until each is known to be faster or known not to matter.

    The leader stays unless another one is faster beyond the confidence interval. A candidate is out when even
    the near end of its interval is less than `TOLERANCE` below the leader: so the winner is no more than that
    slower than the best, as far as the intervals hold. Where they never tell, the medians do.

    Arguments and attributes are those of `Search`.
    """

    def next(self, context: int = 0) -> ExecutionPlan | None:
        """The plan to try now; None: run the leader."""
        return super().next(context) if len(self.standing.window) >= READY else None

    @property
    def standing(self) -> Standing:
        """What the measurements say so far."""
        if self._standing is None:
            self._standing = self._folded()
        return self._standing

    def half_width(self, count: int) -> float:
        """Of the confidence interval of a score from so many measurements."""
        return self._half_width(self.standing.noise, count)

    def _half_width(self, noise: float, count: int) -> float:
        return self.limits.confidence * noise * math.sqrt(1 / max(count, 1) + 1 / WINDOW)

    def _wanted(self, standing: Standing) -> int | None:
        if standing.trials >= self.limits.trials:
            return None
        open_ = [i for i in range(len(self.candidates)) if self._is_open(standing, i)]
        return min(open_, key=lambda i: (len(standing.scores.get(i, [])), i), default=None)

    def out(self) -> list[ExecutionPlan]:
        """Plans that are known to bring nothing beside the best one."""
        standing, best = self.standing, self.plan
        measured = [i for i, scores in standing.scores.items() if scores]
        plans = [self.candidates[i].plan for i in measured if not self._is_open(standing, i)]
        return [plan for plan in plans if plan != best]

    def _is_open(self, standing: Standing, candidate: int) -> bool:
        """Whether a candidate may still be so much faster than the leader that it matters."""
        scores = standing.scores.get(candidate, [])
        if candidate == standing.leader or len(scores) >= MOST:
            return False
        if len(scores) < LEAST:
            return True
        gap = statistics.median_low(scores) - standing.level  # a machine stalls, it never hurries
        return gap - self._half_width(standing.noise, len(scores)) < -TOLERANCE

    def _best(self, standing: Standing) -> int:
        """The leader; or who is ahead of it by half the tolerance after many measurements."""
        scores = {i: statistics.median(s) for i, s in standing.scores.items() if 2 * len(s) >= MOST}
        first = min(scores, key=lambda i: (scores[i], i), default=standing.leader)
        ahead = first != standing.leader and scores[first] < standing.level - TOLERANCE / 2
        return first if ahead else standing.leader

    def _folded(self) -> Standing:
        """Go through the measurements in order."""
        standing, context = Standing(noise=LEAST_NOISE), None
        residuals: list[float] = []
        for sample in self.samples:
            value = math.log(sample.seconds)
            if sample.context != context:
                context, standing.window = sample.context, []
            usual = statistics.median(standing.window) if standing.window else None
            if sample.candidate == standing.leader:
                if usual is not None:
                    residuals.append(abs(value - usual))
                    standing.noise = max(LEAST_NOISE, noise_of(residuals))
                standing.window = [*standing.window, value][-WINDOW:]
                continue
            standing.trials += 1
            if usual is None:
                continue
            scores = standing.scores.setdefault(sample.candidate, [])
            scores.append(value - usual + standing.level)
            self._promote(standing, sample.candidate)
        return standing

    def _promote(self, standing: Standing, candidate: int) -> None:
        """Let a candidate lead that is faster than the leader beyond doubt."""
        scores = standing.scores[candidate]
        level = statistics.median(scores)
        if len(scores) < LEAST or level + self._half_width(standing.noise, len(scores)) >= standing.level:
            return
        standing.scores.setdefault(standing.leader, [standing.level] * MOST)
        standing.leader, standing.level, standing.window = candidate, level, []
