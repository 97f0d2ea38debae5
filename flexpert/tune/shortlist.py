"""The plans worth a prediction: most of them can be told from others that were predicted before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from flexpert.core.plan import ExecutionPlan

from .candidate import Candidate

_HOPELESS = 3.0  # times the best r: its variants will not make up for that
_WORSE = 1.1  # times as long as with half the degree: more chunks will not help


def shortlist(plans: Sequence[ExecutionPlan], cost: Callable[[ExecutionPlan], float]) -> list[Candidate]:
    """Predict some of the plans: every r, and of each that is not hopeless the variants.

    Of algorithm and capacity mode first one is changed, both only where each alone is a gain; the degree is
    raised as long as that does not make it clearly slower. A prediction costs milliseconds.

    Args:
        plans: that can run.
        cost: predicted seconds.
    """
    allowed, found = set(plans), dict[ExecutionPlan, float]()

    def seconds(plan: ExecutionPlan) -> float | None:
        if plan not in allowed:
            return None
        if plan not in found:
            found[plan] = cost(plan)
        return found[plan]

    bases = [plan for r in sorted({p.r for p in plans}) if (plan := _plainest(plans, r)) is not None]
    best = min(time for plan in bases if (time := seconds(plan)) is not None)
    for base in bases:
        if base.r == 0 or found[base] > _HOPELESS * best:
            continue
        variants = [base]
        gains = 0
        for change in ({"algorithm": "2dh"}, {"capacity": "padded"}):
            variant = dataclasses.replace(base, **change)  # type: ignore[arg-type]
            time = seconds(variant)
            if time is not None and variant != base:
                variants.append(variant)
                gains += time < found[base]
        if gains == 2:
            variants.append(dataclasses.replace(base, algorithm="2dh", capacity="padded"))
        for variant in variants:
            last, degree = seconds(variant), variant.degree
            while last is not None:
                degree *= 2
                more = seconds(dataclasses.replace(variant, degree=degree)) if degree <= 8 else None
                last = more if more is not None and more < _WORSE * last else None
    return [Candidate(plan, time) for plan, time in found.items()]


def _plainest(plans: Sequence[ExecutionPlan], r: int) -> ExecutionPlan | None:
    """The plan with this r that is nearest to the defaults."""
    return min(
        (p for p in plans if p.r == r),
        key=lambda p: (p.degree, p.algorithm != "linear", p.capacity != "ragged"),
        default=None,
    )
