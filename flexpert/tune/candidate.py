"""A plan to choose from, and what is predicted for it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flexpert.core.plan import ExecutionPlan


@dataclass(frozen=True)
class Candidate:
    """A plan and the seconds that the model predicts for it."""

    plan: ExecutionPlan
    predicted: float


def corrected(candidates: Sequence[Candidate], errors: dict[ExecutionPlan, float]) -> list[Candidate]:
    """The candidates with the errors of a similar search taken out of their predictions.

    Plans that were not measured there err as those with the same r did, in the median.
    """
    by_r: dict[int, list[float]] = {}
    for plan, error in errors.items():
        by_r.setdefault(plan.r, []).append(error)
    usual = {r: statistics.median(values) for r, values in by_r.items()}
    return [Candidate(c.plan, c.predicted * errors.get(c.plan, usual.get(c.plan.r, 1.0))) for c in candidates]


def describe(plan: ExecutionPlan) -> str:
    """A plan in a few words."""
    more = "".join(f" {word}" for word in (plan.codec, plan.kernel) if word not in ("none", "auto"))
    if plan.r == 0:
        return f"r=0{more}"
    return f"r={plan.r} degree={plan.degree} {plan.algorithm} {plan.capacity}{more}"
