from __future__ import annotations

import itertools
import math

import pytest

from flexpert.train.schedule import warmup_cosine


def test_it_rises_evenly_to_one_and_falls_to_nearly_zero() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert 0 < factors[-1] < 0.001


@pytest.mark.parametrize("total", [1, 2, 7])
def test_short_runs_and_no_warmup_have_no_zero_step(total: int) -> None:
    for warmup in (0.0, 0.5):
        assert all(0 < warmup_cosine(step, total, warmup) <= 1 for step in range(total))
