"""The search on made-up machines, whose best plan is known, with noise as clocks have it."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.tune.candidate import Candidate, corrected, describe
from flexpert.tune.limits import Limits
from flexpert.tune.search import Search

R = (0, 1, 2, 4, 8, 16)


class Machine:
    """True seconds of each plan: convex in r, in degree too; the model errs by up to a given factor."""

    def __init__(self, seed, *, noise=0.05, error=1.25, best_r=4, drift=0.0):
        self.random = random.Random(seed)
        self.noise, self.best_r, self.drift, self.calls = noise, best_r, drift, 0
        plans = [ExecutionPlan(r=0)]
        for r, degree, algorithm in itertools.product(R[1:], (1, 2, 4, 8), ("linear", "2dh")):
            plans.append(ExecutionPlan(r=r, degree=degree, algorithm=algorithm))
        self.truth = {plan: self._seconds(plan) for plan in plans}
        wrong = math.log(error)
        self.candidates = [
            Candidate(plan, seconds * math.exp(self.random.uniform(-wrong, wrong)))
            for plan, seconds in self.truth.items()
        ]

    def _seconds(self, plan):
        place = -1 if plan.r == 0 else math.log2(plan.r)
        base = 0.1 * (1 + 0.3 * abs(place - math.log2(self.best_r)))
        return base * (1 + 0.08 * abs(plan.degree.bit_length() - 2)) * (1.1 if plan.algorithm == "2dh" else 1)

    def run(self, plan):
        self.calls += 1
        level = math.exp(self.drift * math.sin(self.calls / 10))
        outlier = 1.5 if self.random.random() < 0.03 else 1.0
        return self.truth[plan] * level * math.exp(self.random.gauss(0, self.noise)) * outlier


def tune(machine, limits=None, steps=150, **options):
    """Run so many steps: (search, plans that ran)."""
    search, ran = Search(machine.candidates, limits, **options), []
    for _ in range(steps):
        plan = search.next() or search.plan
        search.record(plan, machine.run(plan))
        ran.append(plan)
    return search, ran


@pytest.mark.parametrize("best_r", R[1:])
@pytest.mark.parametrize("seed", range(6))
def test_regret(seed, best_r):
    """The winner is within the noise of the best plan, and all steps cost little more than the best ones."""
    machine = Machine(seed, best_r=best_r)
    search, ran = tune(machine)
    best = min(machine.truth.values())
    assert search.settled
    assert machine.truth[search.plan] <= 1.12 * best  # one step of degree, or of algorithm, and no more
    assert sum(machine.truth[plan] for plan in ran) <= 1.12 * best * len(ran)


def test_regret_on_average_is_small():
    ratios = []
    for seed in range(40):
        machine = Machine(seed, best_r=R[1:][seed % 5])
        search, _ = tune(machine)
        ratios.append(machine.truth[search.plan] / min(machine.truth.values()))
    assert sum(ratios) / len(ratios) <= 1.03


@pytest.mark.parametrize("seed", range(4))
def test_a_machine_that_drifts_misleads_no_more(seed):
    machine = Machine(seed, drift=0.3)
    search, _ = tune(machine)
    assert machine.truth[search.plan] <= 1.12 * min(machine.truth.values())


def test_without_noise_and_error_the_first_choice_stands():
    machine = Machine(0, noise=0.0, error=1.0)
    search, ran = tune(machine)
    assert search.plan == min(machine.truth, key=machine.truth.get) == ran[0]


def test_noise_is_met_with_trials_and_not_with_a_wrong_winner():
    """A plan that takes half as long again seldom wins, however noisy clocks are."""
    plans = [ExecutionPlan(r=1), ExecutionPlan(r=0), ExecutionPlan(r=1, degree=2)]
    truth = dict(zip(plans, (1.0, 1.5, 1.1), strict=True))
    trials = {}
    for noise, most in ((0.03, 0), (0.1, 0), (0.4, 5)):
        wrong, trials[noise] = 0, 0
        for seed in range(50):
            clock = random.Random(seed)
            search = Search([Candidate(plan, 1 + 0.01 * i) for i, plan in enumerate(plans)])
            for _ in range(80):
                plan = search.next() or search.plan
                search.record(plan, truth[plan] * math.exp(clock.gauss(0, noise)))
            wrong += search.plan == plans[1]
            trials[noise] += search.standing.trials
        assert wrong <= most
    assert 4 * trials[0.03] < trials[0.4] <= 50 * Limits().trials


@pytest.mark.parametrize("seed", range(5))
def test_bounds(seed):
    limits = Limits(trials=9, worst=1.6)
    machine = Machine(seed, noise=0.3, error=1.5)
    search, ran = tune(machine, limits)
    predicted = {c.plan: c.predicted for c in machine.candidates}
    assert max(predicted[plan] for plan in ran) <= 1.6 * min(predicted.values())
    assert search.standing.trials <= 9
    assert search.settled


def test_no_two_trials_without_the_leader_between():
    machine = Machine(1)
    search = Search(machine.candidates)
    trials = []
    for _ in range(120):
        wanted = search.next()
        trials.append(wanted is not None)
        plan = wanted or search.plan
        search.record(plan, machine.run(plan))
    assert any(trials)
    assert not any(a and b for a, b in itertools.pairwise(trials))
    assert trials[:2] == [False, False]


@pytest.mark.parametrize("best", range(8))
@pytest.mark.parametrize("count", range(1, 9))
def test_the_search_over_r_finds_the_bottom_of_every_valley(count, best):
    """Without noise, for every number of values of r and every place of the least."""
    plans = [ExecutionPlan(r=0), *(ExecutionPlan(r=2**i) for i in range(count))]
    best = best % len(plans)
    truth = {plan: 1.0 + 0.3 * abs(i - best) for i, plan in enumerate(plans)}
    search = Search([Candidate(plan, 1.0) for plan in plans])
    for _ in range(100):
        plan = search.next() or search.plan
        search.record(plan, truth[plan])
    assert search.plan == plans[best]
    if len(plans) > 6:  # fewer measurements than twice all plans
        assert search.standing.trials < 2 * len(plans)


def test_hints_are_tried_although_the_model_holds_them_for_bad():
    good = ExecutionPlan(r=1, degree=8)
    plans = [ExecutionPlan(r=1), good, ExecutionPlan(r=1, degree=4)]
    candidates = [Candidate(plans[0], 1.0), Candidate(good, 1.8), Candidate(plans[2], 4.0)]
    truth = {plans[0]: 1.0, good: 0.5}

    def winner(**options):
        search = Search(candidates, **options)
        for _ in range(30):
            plan = search.next() or search.plan
            search.record(plan, truth[plan])
        return search.plan

    assert winner() == plans[0]
    assert winner(hints=[good]) == good
    assert winner(hints=[plans[2]]) == plans[0]  # beyond the bound: never run


def test_a_context_of_its_own_needs_measurements_of_its_own():
    plans = [ExecutionPlan(r=1), ExecutionPlan(r=2)]
    search = Search([Candidate(plans[0], 1.0), Candidate(plans[1], 1.1)])
    for _ in range(2):
        search.record(plans[0], 1.0, context=1)
    assert search.next(context=1) == plans[1]
    assert search.next(context=2) is None
    search.record(plans[0], 5.0, context=2)
    search.record(plans[0], 5.0, context=2)
    assert search.next(context=2) == plans[1]
    search.record(plans[1], 5.5, context=2)
    assert search.standing.scores[1] == [pytest.approx(math.log(1.1))]


def test_the_state_is_the_list_of_measurements():
    machine = Machine(3)
    search, _ = tune(machine, steps=25)
    again = Search(machine.candidates)
    for sample in search.samples:
        again.record(search.candidates[sample.candidate].plan, sample.seconds, sample.context)
    assert again.samples == search.samples
    assert (again.next(), again.plan, again.why()) == (search.next(), search.plan, search.why())


def test_measurements_of_no_use_are_ignored():
    search = Search([Candidate(ExecutionPlan(r=1), 1.0)])
    search.record(ExecutionPlan(r=2), 1.0)
    search.record(ExecutionPlan(r=1), 0.0)
    search.record(ExecutionPlan(r=1), math.nan)
    assert search.samples == []
    assert search.settled
    assert "nothing else" in search.why()


def test_why_names_the_winner_and_its_rival():
    machine = Machine(2, noise=0.01, error=1.4)
    search, _ = tune(machine)
    text = search.why()
    assert "first choice" in text
    assert "slower" in text
    assert describe(search.candidates[0].plan) in text or search.plan == search.candidates[0].plan


def test_what_was_learnt_corrects_the_predictions_of_a_similar_search():
    """With the same errors of the model, the second search begins with the winner of the first."""
    machine = Machine(4, noise=0.02, error=1.4)
    search, _ = tune(machine)
    again = Search(corrected(machine.candidates, search.errors()))
    assert machine.truth[again.plan] <= 1.05 * machine.truth[search.plan]
    truth, predicted = again.candidates, {c.plan: c.predicted for c in machine.candidates}
    scale = truth[0].predicted / machine.truth[truth[0].plan]
    for candidate in truth:
        if candidate.plan in search.errors():
            assert candidate.predicted == pytest.approx(scale * machine.truth[candidate.plan], rel=0.12)
        elif candidate.plan.r not in {plan.r for plan in search.errors()}:
            assert candidate.predicted == predicted[candidate.plan]


def test_bad_limits_and_no_plans():
    with pytest.raises(ConfigError, match="worst=0.5"):
        Limits(worst=0.5)
    with pytest.raises(ConfigError, match="confidence=0"):
        Limits(confidence=0)
    with pytest.raises(ConfigError, match="at least one plan"):
        Search([])
