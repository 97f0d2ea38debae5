"""Lines of metrics: each is of the steps since the one before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexpert.train import lines
from flexpert.train.one_rank import OneRank
from flexpert.train.stragglers import Stragglers
from flexpert.train.task import StepResult


class Writer(list[Any]):
    def write(self, step: int, line: dict[str, Any]) -> None:
        self.append((step, line))


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    time = SimpleNamespace(value=100.0)
    monkeypatch.setattr(lines, "time", SimpleNamespace(perf_counter=lambda: time.value))
    return time


def result(loss: float) -> StepResult:
    return StepResult(torch.tensor(loss), {"accuracy": torch.tensor(0.5)}, {})


def test_a_resumed_run_goes_on_from_its_seconds(now: SimpleNamespace) -> None:
    clock, writer, seen = lines.Clock(before=30.0), Writer(), []
    every = lines.MetricsLines(
        SimpleNamespace(tokens_per_step=10), OneRank(), clock, 4, 20, writer, seen.append
    )
    now.value += 2
    every.add(8, result(3.0), 0.1, Stragglers())
    now.value += 5
    every.add(9, result(2.0), 0.2, Stragglers())
    assert [step for step, _ in writer] == [8, 9]
    assert [line for _, line in writer] == seen
    wanted = {"step": 9, "steps": 20, "seconds": 37.0, "lr": 0.2, "tokens_per_second": 2.0, "ranks": 1}
    assert seen[1] == {**wanted, "loss": 2.0, "accuracy": 0.5}
    assert seen[0]["tokens_per_second"] == 20.0  # of 4 steps in 2 s
    assert clock.seconds() == 37.0


def test_other_ranks_than_the_first_tell_nothing(now: SimpleNamespace) -> None:
    seen: list[Any] = []
    every = lines.MetricsLines(
        SimpleNamespace(tokens_per_step=10), OneRank(), lines.Clock(0.0), 0, 2, None, seen.append
    )
    now.value += 1
    every.add(1, result(1.0), 0.1, Stragglers())
    assert not seen
