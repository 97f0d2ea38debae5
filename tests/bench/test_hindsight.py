"""What hindsight says of times that are known."""

from __future__ import annotations

import random

import pytest

from benchmarks.tune.hindsight import Hindsight

TRUTH = ({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0})  # seconds of a step, by phase


def measured(tuned, noise=0.0, passes=3, steps=8, plans=None, hiccup=None):
    """Blocks of a tuned run that takes the plan `tuned(turn, phase)`, and rounds of the static plans."""
    draw = random.Random(0)

    def times(phase, plan, count):
        seconds = (plans or TRUTH)[phase][plan]
        return [seconds * (1 + draw.uniform(-noise, noise)) for _ in range(count)]

    found = {"blocks": [], "rounds": []}
    for turn in range(passes):
        for phase, of_phase in enumerate(plans or TRUTH):
            for half in (0, 1):
                place = {"turn": turn, "phase": phase, "half": half}
                plan = tuned(turn, phase)
                block = {"seconds": times(phase, plan, steps), "plans": [plan] * steps}
                found["blocks"].append(place | block)
                found["rounds"].append(place | {"seconds": {p: times(phase, p, steps) for p in of_phase}})
    if hiccup is not None:
        found["blocks"][0]["seconds"][0] = hiccup
    return found


def test_regret_is_what_was_lost():
    best = Hindsight(measured(lambda turn, phase: "ab"[phase])).over(range(3))
    assert best["regret"] == pytest.approx(0.0)
    assert best["steps"] == 3 * 2 * 2 * 8
    assert best["hindsight"] == pytest.approx(best["steps"] * 1.5)
    assert best["static"] == pytest.approx({"a": best["steps"] * 2.0, "b": best["steps"] * 2.0})
    wrong_once = Hindsight(measured(lambda turn, phase: "ab"[phase] if turn else "a"))
    assert wrong_once.over([0])["regret"] == pytest.approx(1 / 3)
    assert wrong_once.over([1, 2])["regret"] == pytest.approx(0.0)
    assert wrong_once.over(range(3))["regret"] == pytest.approx(1 / 9)
    assert wrong_once.over(range(3))["of_the_tuner_itself"] == pytest.approx(0.0)


def test_equal_plans_are_not_beaten_by_the_least_of_their_noise():
    """Of ten plans that take the same time the best one's median is always too good."""
    plans = ({f"p{i}": 1.0 for i in range(10)},)
    found = Hindsight(measured(lambda turn, phase: "p0", noise=0.3, plans=plans))
    assert abs(found.over(range(3))["regret"]) < 0.05
    naive = min(found.times(0, range(3)).values())
    assert found.best(0, range(3)) > naive


def test_a_hiccup_counts_as_twice_the_median():
    found = Hindsight(measured(lambda turn, phase: "ab"[phase], hiccup=500.0))
    assert found.over(range(3))["tuned"] == pytest.approx(3 * 2 * 8 * 3.0 + 1.0)


def test_a_plan_that_only_the_tuned_run_took_is_compared():
    data = measured(lambda turn, phase: "c", plans=({"a": 2.0, "b": 3.0, "c": 1.0},))
    for round_ in data["rounds"]:
        del round_["seconds"]["c"]
    found = Hindsight(data)
    assert found.best(0, range(3)) == pytest.approx(1.0)
    assert "c" not in found.over(range(3))["static"]
