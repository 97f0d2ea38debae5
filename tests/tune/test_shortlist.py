"""The shortlist against predictions of all plans."""

from __future__ import annotations

import itertools
import random

import pytest

from flexpert.core.plan import ExecutionPlan
from flexpert.tune.shortlist import shortlist

PLANS = [
    ExecutionPlan(r=0),
    *(
        ExecutionPlan(r=r, degree=degree, algorithm=algorithm, capacity=capacity)
        for r, degree, algorithm, capacity in itertools.product(
            (1, 2, 4), (1, 2, 4, 8), ("linear", "2dh"), ("ragged", "padded")
        )
    ),
]


@pytest.mark.parametrize("seed", range(30))
def test_the_best_plan_is_on_it(seed):
    """Where choices act each by a factor of its own, and time has one valley in the degree."""
    draw = random.Random(seed)
    of_r = {r: draw.uniform(0.1, 0.3) for r in (0, 1, 2, 4)}
    hierarchical, padded = draw.uniform(0.7, 1.4), draw.uniform(0.7, 1.4)
    best, slope = draw.choice((0, 1, 2, 3)), draw.uniform(0.02, 0.3)

    def cost(plan):
        asked.append(plan)
        factor = 1 + slope * abs(plan.degree.bit_length() - 1 - best) if plan.r else 1
        algorithm = hierarchical if plan.algorithm == "2dh" else 1
        return of_r[plan.r] * factor * algorithm * (padded if plan.capacity == "padded" else 1)

    asked = []
    found = shortlist(PLANS, cost)
    assert len(asked) == len(found) == len(set(asked))
    full = min(cost(plan) for plan in PLANS)
    assert min(candidate.predicted for candidate in found) == pytest.approx(full)
    assert {candidate.plan.r for candidate in found} == {0, 1, 2, 4}


def test_hopeless_variants_are_not_asked_for():
    asked = []

    def cost(plan):
        asked.append(plan)
        return {0: 9.0, 1: 1.0, 2: 5.0, 4: 2.0}[plan.r] * plan.degree

    found = shortlist(PLANS, cost)
    assert [c.plan for c in found if c.plan.r in (0, 2)] == [ExecutionPlan(r=0), ExecutionPlan(r=2)]
    assert len(asked) < 20


def test_plans_that_cannot_run_are_not_asked_for():
    only = [ExecutionPlan(r=1), ExecutionPlan(r=1, algorithm="2dh", degree=2)]
    assert [c.plan for c in shortlist(only, lambda plan: 1.0)] == only[:1]
    one = [ExecutionPlan(r=1, degree=4, capacity="padded")]
    assert [c.plan for c in shortlist(one, lambda plan: 1.0)] == one
