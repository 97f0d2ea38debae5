"""The tuner on gloo ranks: agreement under unlike clocks, bounds, drift, replay, errors."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.testing import run_ranks
from flexpert.tune import Tuner, TunerSettings
from flexpert.tune.drift import Drift
from flexpert.tune.log import PlanLog
from tests.tune import tuning

RANKS = 4
BEST = ExecutionPlan(r=1, degree=2)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """What every rank says of 120 steps in two buckets."""
    path = tmp_path_factory.mktemp("run") / "plans.jsonl"
    return run_ranks(tuning.run, RANKS, 120, (20, 60), 1, path), path


def test_ranks_with_unlike_clocks_run_the_same_plans(searched):
    results, path = searched
    plans = [result[0] for result in results]
    assert all(other == plans[0] for other in plans)
    assert len({tuple(plan) for plan in plans[0]}) > 3  # it did try some
    assert all(result[1] == results[0][1] for result in results)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(120))
    texts = [next(iter(line["plans"])) for line in lines]
    assert [f"r={p[0]} degree={p[1]}" for p in plans[0]] == [" ".join(t.split()[:2]) for t in texts]


def test_the_best_plan_wins_in_each_bucket(searched):
    _, report, _ = searched[0][0]
    assert [bucket["winner"] for bucket in report["buckets"]] == ["r=1 degree=2 linear ragged"] * 2
    assert all(bucket["settled"] for bucket in report["buckets"])
    assert "faster than the first choice" in report["buckets"][0]["why"]
    assert "the first choice stood" in report["buckets"][1]["why"]  # the model's error is known by then
    assert report["trials"] == sum(bucket["trials"] for bucket in report["buckets"])
    first, second = report["buckets"]
    assert second["trials"] < first["trials"]


def test_two_layers_share_what_they_learn():
    results = run_ranks(tuning.run, RANKS, 60, (20,), 2)
    plans, report, _ = results[0]
    assert all(result[0] == plans for result in results)
    assert plans[-1] == BEST.encode()
    assert len(report["buckets"]) == 1
    assert len(report["layers"]) == 2


def test_the_fastest_kernel_of_the_best_plan_wins(tmp_path):
    """All ranks try it and take it; log, replay, state and deterministic plans carry it."""
    results = run_ranks(tuning.raced, 2, tmp_path / "plans.jsonl")
    plans, report, repeated, then = results[0]
    assert all(result[0] == plans for result in results)
    best = dataclasses.replace(BEST, kernel="recompute").encode()
    (bucket,) = report["buckets"]
    assert bucket["settled"]
    assert bucket["winner"] == "r=1 degree=2 linear ragged recompute"
    assert plans[-1] == best
    assert repeated
    assert then == [best] * 3


def test_bounds_hold():
    plans, report, _ = run_ranks(tuning.limited, RANKS, 60, 5, 1.5)[0]
    assert report["trials"] <= 3 + 0.1 * 60
    assert all(bucket["trials"] <= 5 for bucket in report["buckets"])
    assert all(bucket["worst_tried"] <= 1.5 for bucket in report["buckets"])
    costs = {tuple(plan): tuning.wrong_cost(None, ExecutionPlan.decode(list(plan)), None) for plan in plans}
    cheapest = tuning.wrong_cost(None, ExecutionPlan(r=2), None)
    first = tuple(ExecutionPlan().encode())  # of the first step, before anything is known
    assert all(cost <= 1.5 * cheapest for plan, cost in costs.items() if plan != first)


def test_a_plan_that_slows_down_is_tuned_anew():
    results = run_ranks(tuning.drifting, RANKS, 200)
    plans, report, _ = results[0]
    assert all(result[0] == plans for result in results)
    bucket = report["buckets"][0]
    assert bucket["retuned"] == 1
    assert bucket["settled"]
    assert {tuple(plan) for plan in plans[100:120]} == {tuple(BEST.encode())}
    assert len({tuple(plan) for plan in plans[120:132]}) > 1  # noticed though sums had become seldom
    assert bucket["winner"] == "r=1 degree=2 linear ragged"


def test_a_resumed_run_replays_the_log_and_goes_on(tmp_path):
    for same, count, steps in run_ranks(tuning.resumed, RANKS, tmp_path / "plans.jsonl", 15, 10):
        assert same
        assert (count, steps) == (12, 27)
    lines = (tmp_path / "plans.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))


def test_deterministic_runs_try_nothing_and_repeat_themselves(tmp_path):
    for whole, parts, trials in run_ranks(tuning.deterministic, RANKS, 16, 7, tmp_path / "tune.json"):
        assert whole == parts
        assert trials == 0


def test_auto_is_an_argument_of_calls_and_scopes():
    assert run_ranks(tuning.scopes, RANKS)[0] == [True, False, False, True, False, True]


def test_auto_without_a_tuner_is_an_error():
    message, shape = run_ranks(tuning.without_tuner, RANKS)[0]
    assert "ConfigError" in message
    assert "flexpert.tune.attach" in message
    assert shape == (4, tuning.D)


def test_knowledge_is_kept_on_disk(tmp_path):
    path = tmp_path / "tune.json"
    run_ranks(tuning.run, RANKS, 70, (20,), 1, None, path)
    assert json.loads(path.read_text(encoding="utf-8"))["entries"][0]["winner"] == BEST.to_dict()
    plans, report, _ = run_ranks(tuning.run, RANKS, 5, (20,), 1, None, path)[0]
    assert plans[1:] == [BEST.encode()] * 4  # at once, and nothing is tried
    assert report["trials"] == 0


def test_knowledge_of_another_world_is_refused_with_one_warning(tmp_path):
    path = tmp_path / "tune.json"
    run_ranks(tuning.run, RANKS, 20, (20,), 1, None, path)
    first, other = run_ranks(tuning.warned, 2, path)
    assert len(first) == 1
    assert "ranks 4, not 2" in first[0]
    assert other == []


def test_usage_errors():
    tuner = Tuner(tuning.wrong_cost)
    with pytest.raises(ConfigError, match="attach"), tuner.step():
        pass
    with pytest.raises(ConfigError, match="share=2"):
        TunerSettings(share=2)
    with pytest.raises(ConfigError, match="band=0"):
        TunerSettings(band=0)


def steps_until_noticed(times):
    """After a quiet time of 1 second a step; None: never."""
    drift = Drift(band=0.25)
    assert not any(drift.add(1.0, 0) for _ in range(20))
    return next((i for i, seconds in enumerate(times, 1) if drift.add(seconds, 0)), None)


@pytest.mark.parametrize("change", [1, -1])
def test_the_larger_a_drift_the_sooner_it_is_noticed(change):
    assert steps_until_noticed([3**change] * 9) == 3
    assert steps_until_noticed([1.5**change] * 9) == 6
    assert steps_until_noticed([1.35**change] * 20) == 13
    assert steps_until_noticed([1.2**change] * 99) is None


def test_drift_needs_more_than_an_outlier():
    assert steps_until_noticed([5.0] * 2 + ([1.0] * 3 + [5.0]) * 20) is None
    drift = Drift(band=0.25)
    assert not any(drift.add(2.0, context) for context in range(30))  # another context is no drift
    noisy = Drift(band=0.25)
    assert not any(noisy.add(math.exp(x), 0) for x in [0.0, 0.2, -0.2] * 7 + [0.6] * 12)


def test_a_log_that_was_cut_off_is_read_to_its_last_whole_line(tmp_path):
    log = PlanLog(tmp_path / "plans.jsonl")
    plans = {"a": ExecutionPlan(r=2, degree=4), "b": ExecutionPlan(r=0)}
    for number in range(6):
        log.write(number, plans, trial=number == 3)
    log.flush()
    with log.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "pl')
    assert log.rewind(4) == {4: plans, 5: plans}
    assert log.rewind(9) == {}
    assert len(log.path.read_text(encoding="utf-8").splitlines()) == 4
    log.path.write_text("nonsense\n" * 2, encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1"):
        log.rewind(0)
