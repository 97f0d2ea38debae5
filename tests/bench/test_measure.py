from __future__ import annotations

import pytest
import torch

from flexpert import ops
from flexpert.bench import measure
from flexpert.bench.implementations import (
    DECODE,
    FORWARD,
    TRAINING,
    Implementation,
    UnavailableError,
    fused,
)
from flexpert.ops import select


def test_the_slow_sits_out_but_has_its_least_number_of_turns(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def run(name, seconds):
        def once():
            now[0] += seconds
            calls.append(name)
            return seconds

        return once

    times = measure.interleave({"slow": run("slow", 2.0), "fast": run("fast", 0.1)}, seconds=10.0)
    assert len(times["slow"]) == 3
    assert len(times["fast"]) > 20
    assert times["slow"] == [2000.0] * 3
    assert calls[:2] == ["slow", "fast"]
    # Equal ones take turns, whoever begins.
    calls.clear()
    measure.interleave({"a": run("a", 1.0), "b": run("b", 1.0)}, seconds=8.0)
    assert calls == ["a", "b", "b", "a"] * 2
    # Nobody is measured in no time.
    assert measure.interleave({}, seconds=0.0) == {}


def test_summary():
    figures = measure.summary([4.0, 1.0, 2.0, 3.0, 100.0])
    assert figures == {"median_ms": 3.0, "min_ms": 1.0, "spread_percent": 1683.3, "repetitions": 5}
    assert measure.summary([0.0, 0.0])["spread_percent"] == 0


def test_what_a_repetition_runs(make, monkeypatch):
    problem, calls, now = make(), [], [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def step():
        calls.append(torch.is_grad_enabled())
        now[0] += 0.004
        return problem.x_TD * 1

    item = Implementation(name="x", make=lambda problem: step)
    assert measure.make_run(item, step, problem, FORWARD)() == pytest.approx(0.004)
    assert calls == [False]
    assert measure.make_run(item, step, problem, DECODE)() == pytest.approx(0.004)
    assert calls == [False] * (1 + 1 + 3)  # one of them untimed, three to fill 10 ms
    for _ in range(2):
        measure.make_run(item, step, problem, TRAINING)()
        assert torch.equal(problem.x_TD.grad, problem.grad_TD)  # fresh, not added up
    assert calls[5:] == [True, True]


def test_the_backend_is_forced_in_backward_too(make, monkeypatch):
    problem, forced = make(), []
    kernel = select.PORTABLE.kernels["grouped_mlp_backward"]

    def recording(*args):
        forced.append(select._forced.name)
        return kernel(*args)

    spy = select.Backend(
        name="spy", kernels={**select.PORTABLE.kernels, "grouped_mlp_backward": recording},
        verify=select.PORTABLE.verify,
    )  # fmt: skip
    monkeypatch.setattr(select, "BACKENDS", [*select.BACKENDS, spy])
    item = Implementation(name="x", make=fused, backend="spy")
    measure.prepare(item, problem, TRAINING)()
    assert forced == ["spy", "spy"]
    assert ops.report()[0]["backend"] != "spy"


def test_failures_of_others_are_told_and_ours_are_raised(make):
    def fail(problem):
        def step():
            raise RuntimeError("first line\nsecond")

        return step

    with pytest.raises(UnavailableError, match="^failed: first line$"):
        measure.prepare(Implementation(name="other", make=fail), make(), FORWARD)
    with pytest.raises(RuntimeError, match="second"):
        measure.prepare(Implementation(name="flexpert", make=fail), make(), FORWARD)
