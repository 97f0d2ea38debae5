"""One bucket on made-up clocks: the search among plans, the race of kernels, the watch over the winner."""

from __future__ import annotations

import json
import math
import random

import pytest

from flexpert.core.plan import ExecutionPlan
from flexpert.tune.bucket import Bucket
from flexpert.tune.candidate import Candidate
from flexpert.tune.dictionary import Dictionary
from flexpert.tune.entry import Entry
from flexpert.tune.gather import Seen
from flexpert.tune.limits import Limits
from flexpert.tune.propose import TunedLayer, propose
from flexpert.tune.report import bucket_report, table
from tests.tune.cases import shape_of

SHAPE = shape_of(slices=2)
PLANS = (ExecutionPlan(r=1), ExecutionPlan(r=2), ExecutionPlan(r=2, degree=2), ExecutionPlan(r=0))
OF_PLAN = dict(zip(PLANS, (1.2, 1.0, 1.1, 1.8), strict=True))
KERNELS = ("portable", "recompute", "separate")


class Clock:
    """Seconds of a step by plan and kernel, with noise and now and then a stall."""

    def __init__(self, seed, kernels, noise=0.03, stalls=0.02):
        self.random = random.Random(seed)
        self.kernels, self.noise, self.stalls, self.scale = {"auto": 1.0, **kernels}, noise, stalls, 1.0

    def truth(self, plan):
        usual = ExecutionPlan(r=plan.r, degree=plan.degree)
        return self.scale * OF_PLAN[usual] * self.kernels[plan.kernel]

    def __call__(self, plan):
        stall = 2.0 if self.random.random() < self.stalls else 1.0
        return self.truth(plan) * math.exp(self.random.gauss(0, self.noise)) * stall


def begin(kernels=KERNELS, **limits):
    candidates = [Candidate(plan, 1.0 + 0.05 * i) for i, plan in enumerate(PLANS)]
    return Entry.begin(SHAPE, candidates, Limits(**limits), kernels=kernels)


def live(entry, clock, steps=150):
    """Run so many steps; the plans that ran."""
    ran = []
    for _ in range(steps):
        plan = entry.next() or entry.plan
        entry.record(plan, clock(plan))
        ran.append(plan)
    return ran


@pytest.mark.parametrize("best", KERNELS)
@pytest.mark.parametrize("seed", range(5))
def test_a_kernel_that_is_clearly_faster_wins(best, seed):
    clock = Clock(seed, {kernel: 0.75 if kernel == best else 1.3 for kernel in KERNELS})
    entry = begin()
    live(entry, clock)
    assert entry.settled
    assert entry.plan == ExecutionPlan(r=2, kernel=best)
    assert entry.search.plan == ExecutionPlan(r=2)
    assert "faster than the first choice" in entry.why()
    assert entry.lost() >= {"auto"}


def test_slower_kernels_leave_the_usual_one_in_place():
    """Whatever the noise: none of them is ahead beyond the interval, but by rare chance."""
    wrong = 0
    for seed in range(60):
        noise = (0.01, 0.05, 0.15)[seed % 3]
        entry = begin(trials=40)
        live(entry, Clock(seed, {"portable": 1.02, "recompute": 1.05, "separate": 1.3}, noise), 400)
        assert entry.settled
        wrong += entry.plan.kernel != "auto"
    assert wrong <= 3


@pytest.mark.parametrize("seed", range(6))
def test_regret_counts_the_kernels_trials(seed):
    """Kernels that take twice as long: all steps together take little longer than with the best plan."""
    clock = Clock(seed, dict.fromkeys(KERNELS, 2.0))
    entry = begin()
    ran = live(entry, clock, 150)
    assert entry.plan == ExecutionPlan(r=2)
    assert sum(map(clock.truth, ran)) <= 1.12 * len(ran)
    assert sum(plan.kernel != "auto" for plan in ran) == 2 * len(KERNELS)  # once alone may be a stall


@pytest.mark.parametrize("trials", [0, 2, 5, 9, 16])
def test_one_bound_holds_for_plans_and_kernels(trials):
    clock = Clock(1, dict.fromkeys(KERNELS, 1.01), noise=0.3)
    entry = begin(trials=trials)
    live(entry, clock, 300)
    assert entry.settled
    assert entry.trials <= trials


def test_without_other_kernels_there_is_no_race():
    entry = begin(kernels=())
    ran = live(entry, Clock(0, {}), 100)
    assert entry.settled
    assert entry.race is None
    assert {plan.kernel for plan in ran} == {"auto"}
    assert "kernel" not in entry.why()


def test_one_plan_alone_races_its_kernels_at_once():
    entry = Entry.begin(SHAPE, [Candidate(PLANS[1], 1.0)], kernels=["portable"])
    assert not entry.settled
    live(entry, Clock(0, {"portable": 0.5}), 30)
    assert entry.plan == ExecutionPlan(r=2, kernel="portable")


@pytest.mark.parametrize("steps", [3, 20, 45, 150])
def test_a_saved_entry_goes_on_where_it_ended(steps):
    clock = Clock(3, {"portable": 0.8, "recompute": 1.1, "separate": 1.5})
    entry = begin()
    live(entry, clock, steps)
    data = json.loads(json.dumps(entry.to_dict()))
    again = Entry.from_dict(data, SHAPE)
    assert again.to_dict() == entry.to_dict()
    assert (again.next(), again.plan, again.settled) == (entry.next(), entry.plan, entry.settled)
    assert data["winner"] == entry.plan.to_dict()
    if steps == 150:
        assert [c["plan"]["kernel"] for c in data["race"]["candidates"]] == ["auto", *KERNELS]


def test_an_entry_without_kernels_in_its_file_is_read():
    entry = begin(kernels=())
    live(entry, Clock(0, {}), 60)
    data = entry.to_dict()
    assert "kernels" not in data
    assert Entry.from_dict(data, SHAPE).plan == entry.plan


def test_a_race_under_other_limits_that_give_another_winner_is_left_out():
    clock = Clock(3, dict.fromkeys(KERNELS, 0.8))
    entry = begin()
    live(entry, clock)
    data = entry.to_dict()
    none = Entry.from_dict(data, SHAPE, Limits(trials=2))  # r = 1 stands, as nothing was tried
    assert none.race is None
    assert none.plan.kernel == "auto"


def test_a_winner_whose_time_changes_is_searched_for_anew():
    clock = Clock(0, {"portable": 0.7, "recompute": 1.2, "separate": 1.2}, noise=0.01, stalls=0)
    entry = begin()
    live(entry, clock)
    assert entry.plan.kernel == "portable"
    clock.scale, clock.kernels["portable"] = 2.0, 1.4
    live(entry, clock)
    assert entry.retuned == 1
    assert entry.settled
    assert entry.plan == ExecutionPlan(r=2)


def test_kernels_that_lost_are_not_tried_in_similar_buckets():
    layer = TunedLayer(SHAPE, slice(0, 4), PLANS, KERNELS)
    dictionary = Dictionary({}, 128)

    def entry_of(rows):
        seen = Seen(counts=(128 * rows,) * 4, capacity=None, tokens=128 * rows)
        key = SHAPE, Bucket(rows=rows)
        cost = lambda shape, plan, workload: OF_PLAN[plan]  # noqa: E731
        dictionary.entries[key] = propose(layer, seen, key, dictionary, cost, Limits(trials=30))
        return dictionary.entries[key]

    first, near, far = entry_of(3), entry_of(4), entry_of(40)
    clock = Clock(0, {"portable": 0.7, "recompute": 1.5, "separate": 1.5})
    live(first, clock)
    assert first.plan.kernel == "portable"
    assert dictionary.lost_kernels(SHAPE, Bucket(rows=4)) == {"auto", "recompute", "separate"}
    assert dictionary.lost_kernels(SHAPE, Bucket(rows=40)) == set()
    near.spare(["recompute", "separate"])
    assert {plan.kernel for plan in live(near, clock)} == {"auto", "portable"}
    assert near.plan.kernel == "portable"
    near.spare(["portable"])  # too late: it was tried, and won
    assert near.plan.kernel == "portable"
    far.spare(KERNELS)
    live(far, clock)
    assert far.race is None
    assert far.settled


def test_a_report_shows_the_kernels():
    entry = begin()
    live(entry, Clock(0, {"portable": 0.7, "recompute": 1.5, "separate": 1.5}))
    found = bucket_report(SHAPE, Bucket(rows=3), entry, 128)
    assert found["winner"] == "r=2 degree=1 linear ragged portable"
    assert found["kernels"][0]["plan"] == found["winner"]
    assert found["kernels"][0]["winner"]
    assert found["trials"] == entry.trials
    text = table(found)
    assert "the best of them with each kernel:" in text
    assert "*r=2 degree=1 linear ragged portable" in text
    assert "Its kernel: " in text
