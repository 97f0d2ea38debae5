"""What a list of measurements says of plans: scores beside the leader's, who leads, how noisy clocks are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW = 5  # of the leader's last measurements, against which a trial is judged


@dataclass(frozen=True)
class Sample:
    """A measurement: which candidate, seconds, and a number that says what else was the same."""

    candidate: int
    seconds: float
    context: int = 0


@dataclass
class Standing:
    """What the measurements say.

    Attributes:
        leader: the candidate that runs where nothing is tried.
        scores: of each tried candidate, log(its seconds / the seconds of the model's first choice), each from
            a comparison with measurements of the leader around it.
        level: the leader's own score.
        window: log seconds of the leader's latest measurements.
        trials: of other plans than the leader.
        noise: relative error of one measurement.
    """

    leader: int = 0
    level: float = 0.0
    trials: int = 0
    noise: float = 0.0
    scores: dict[int, list[float]] = field(default_factory=dict)
    window: list[float] = field(default_factory=list)

    def score(self, candidate: int) -> float:
        """The score of the leader, or of a candidate that was tried."""
        if candidate == self.leader:
            return self.level
        return statistics.median(self.scores[candidate])

    def error(self, count: int) -> float:
        """Standard error of a score from so many measurements."""
        return self.noise * math.sqrt(1 / max(count, 1) + 1 / WINDOW)


def noise_of(residuals: Sequence[float]) -> float:
    """Standard deviation of what has these absolute values, by their median: a machine stalls now and then.

    That of few values is too small on average; the last factor makes up for it.
    """
    count = max(len(residuals), 2)
    return 1.4826 * statistics.median(residuals) * count / (count - 0.8)


def standing_of(samples: Sequence[Sample], least_noise: float) -> Standing:
    """Go through measurements in order; who is ahead in two of them by a standard error leads.

    Args:
        samples: trials, each compared with the leader's measurements before it.
        least_noise: relative error of one measurement that is assumed at least.
    """
    standing, context = Standing(noise=least_noise), None
    residuals: list[float] = []
    for sample in samples:
        value = math.log(sample.seconds)
        if sample.context != context:
            context, standing.window = sample.context, []
        usual = statistics.median(standing.window) if standing.window else None
        if sample.candidate == standing.leader:
            if usual is not None:
                residuals.append(abs(value - usual))
                standing.noise = max(least_noise, noise_of(residuals))
            standing.window = [*standing.window, value][-WINDOW:]
            continue
        standing.trials += 1
        if usual is None:
            continue
        scores = standing.scores.setdefault(sample.candidate, [])
        scores.append(value - usual + standing.level)
        level = statistics.median(scores)
        if len(scores) >= 2 and level + standing.error(len(scores)) < standing.level:
            if standing.leader not in standing.scores:
                standing.scores[standing.leader] = [standing.level] * 2
            standing.leader, standing.level, standing.window = sample.candidate, level, []
    return standing
