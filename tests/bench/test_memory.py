from __future__ import annotations

import os
import time

import pytest
import torch

from flexpert.bench import memory
from flexpert.bench.implementations import FORWARD, Implementation, UnavailableError

pytestmark = pytest.mark.skipif(not memory.STATUS.exists(), reason="the system has no /proc")


def test_a_child_returns_fails_or_is_ended(monkeypatch):
    fork, children = os.fork, []
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    assert memory.in_child(lambda: [os.getpid(), "x" * 100_000])[0] == children[0]
    assert memory.in_child(lambda: 1 / 0) is None
    assert memory.in_child(lambda: time.sleep(3600) or 1, seconds=0.2) is None
    assert len(children) == 3
    for child in children:  # none is left behind
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_peaks_are_those_of_each_alone(make):
    problem = make()

    def item(name, mib, **facts):
        def build(problem):
            return lambda: problem.x_TD * torch.ones(mib * 2**18)[0]

        return Implementation(name=name, make=build, **facts)

    def refuse(problem):
        raise UnavailableError("no")

    found = memory.peaks(
        problem.shape,
        problem.dtype,
        [
            item("large", 200),
            item("small", 1),
            item("forward", 1, modes=(FORWARD,)),
            Implementation(name="none", make=refuse),
        ],
    )
    assert found.keys() == {"large", "small", "none"}
    assert found["none"] is None
    assert 190 < found["large"] - found["small"] < 250


def test_a_system_without_fork_measures_none(make, monkeypatch):
    monkeypatch.delattr(os, "fork")
    problem = make()
    assert memory.peaks(problem.shape, problem.dtype, [Implementation(name="x", make=None)]) == {}
