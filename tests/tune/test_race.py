"""The search among a few plans of one rank, on made-up clocks: its winner is near the best."""

from __future__ import annotations

import math
import random

import pytest

from flexpert.core.plan import ExecutionPlan
from flexpert.tune.candidate import Candidate
from flexpert.tune.limits import Limits
from flexpert.tune.race import MOST, TOLERANCE, Race

PLANS = [ExecutionPlan(kernel=kernel) for kernel in ("auto", "portable", "recompute", "separate")]
PLANS.append(ExecutionPlan(capacity="padded"))


def race(truth, seed, noise=0.01, steps=400, **limits):
    """Run so many steps of plans that take `truth` seconds: (race, how often each plan was tried)."""
    clock = random.Random(seed)
    search = Race([Candidate(plan, 1.0) for plan in PLANS], Limits(**limits))
    tried = dict.fromkeys(PLANS, 0)
    for _ in range(steps):
        plan = search.next()
        if plan is not None:
            tried[plan] += 1
        plan = plan or search.plan
        stall = 3.0 if clock.random() < 0.02 else 1.0
        seconds = truth[PLANS.index(plan)] * math.exp(clock.gauss(0, noise)) * stall
        search.record(plan, seconds)
    return search, tried


@pytest.mark.parametrize("best", range(len(PLANS)))
def test_the_winner_is_within_the_tolerance_of_the_best(best):
    for seed in range(20):
        truth = [1 + 0.08 * abs(i - best) for i in range(len(PLANS))]
        search, tried = race(truth, seed)
        assert search.settled
        assert truth[PLANS.index(search.plan)] <= (1 + TOLERANCE) * min(truth)
        assert sum(tried.values()) == search.standing.trials <= Limits().trials


def test_what_makes_no_difference_changes_nothing():
    """Plans that differ by less than the tolerance: one as good as that which runs without a tuner stays."""
    stayed = 0
    for seed in range(40):
        truth = [1.0, 1.01, 0.99, 1.0, 1.02]
        search, _ = race(truth, seed, noise=0.02, trials=40)
        stayed += search.plan == PLANS[0]
        assert truth[PLANS.index(search.plan)] <= 1.01
    assert stayed >= 20


def test_noise_that_hides_all_differences_ends_at_the_bound():
    search, tried = race([1.0, 0.99, 1.01, 1.0, 1.0], 3, noise=0.3, trials=100)
    assert search.settled
    assert max(tried.values()) <= MOST


def test_slow_plans_are_tried_twice():
    _, tried = race([1.0, 2.0, 3.0, 1.5, 4.0], 0)
    assert [tried[plan] for plan in PLANS[1:]] == [2] * 4


def test_a_saved_race_goes_on_where_it_ended():
    search, _ = race([1.0, 0.8, 1.2, 1.0, 1.1], 1, steps=30)
    again = Race(search.candidates, search.limits, first=search.candidates[0].plan)
    for sample in search.samples:
        again.record(search.candidates[sample.candidate].plan, sample.seconds, sample.context)
    assert again.plan == search.plan
    assert again.standing == search.standing
    assert "faster than the first choice" in search.why()
