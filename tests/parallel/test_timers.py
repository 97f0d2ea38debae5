"""Stragglers: found, and told why, on clocks that only the test moves."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from flexpert import InputError, MoE, MoEConfig
from flexpert.parallel import expert_mesh, parallelize, straggler_report, time_phases, timers
from flexpert.parallel.timers import BUSY, PHASES, PhaseTimers, judge
from flexpert.testing import run_ranks

USUAL = {"route": 1.0, "experts": 4.0, "dense": 3.0, "optimiser": 1.0}


def table(**changed):
    """Seconds of four ranks, of which rank 2 differs; it is waited for, so that the waits say nothing."""
    columns = {phase: [USUAL.get(phase, 2.0)] * 4 for phase in PHASES}
    for phase, value in changed.items():
        columns[phase][2] = value
    return columns


@pytest.mark.parametrize(
    ("seconds", "rows", "links", "want", "words"),
    [
        (table(), [8] * 4, [1.0] * 4, (None, None, None), "no rank works more than 1.5 times as long"),
        (
            table(dense=9.0),
            [8] * 4,
            [],
            (12, "dense", "machine"),
            "rank 12 is slow in dense: 9 s, others 3 s",
        ),
        (table(experts=16.0), [8, 8, 32, 8], [], (12, "experts", "rows"), "its rows explain it (32 rows"),
        (table(experts=16.0), [8] * 4, [], (12, "experts", "machine"), "its rows do not explain it (8 rows"),
        (table(experts=16.0), [0, 0, 32, 0], [], (12, "experts", "rows"), "32 rows, others 0"),
        (table(experts=16.0), [8, 8, 0, 8], [], (12, "experts", "machine"), "it has no rows at all"),
        (table(), [8] * 4, [1.0, 1.1, 4.0, 0.9], (12, "link", "link"), "rank 12 has a slow link: 4 s"),
        # Of two ranks with a link in common neither is to blame.
        (table(), [8] * 4, [4.0, 4.0], (None, None, None), "no rank works"),
    ],
)
def test_who_is_blamed_for_what(seconds, rows, links, want, words):
    report = judge([10, 11, 12, 13], seconds, rows, links, threshold=1.5)
    assert (report.rank, report.phase, report.cause) == want
    assert words in report.line


class Clock:
    """Stands still until something takes its time."""

    now = 0.0

    def __call__(self):
        return self.now


def step_on_a_clock(shares, seconds_per_row):
    """One training step; rank i gets shares[i] of rank 0's tokens and needs so long for a row."""
    rank = dist.get_rank()
    clock, timers.clock = Clock(), None
    timers.clock = clock
    layer = MoE(MoEConfig(model_dim=2, hidden_dim=4, num_experts=2, top_k=1))
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    bank = layer.experts
    rows_of = type(bank).rows

    def slow_rows(self, rows, *args):
        clock.now += rows.shape[0] * seconds_per_row[rank]
        return rows_of(self, rows, *args)

    bank.rows = slow_rows.__get__(bank)
    layer.router.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + 0.5))
    torch.manual_seed(0)
    mesh = expert_mesh(2)
    parallelize(layer, mesh)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.ones(sum(shares), 2)
    x[shares[0] :] *= -1
    try:
        with time_phases(layer, optimizer) as mine:
            layer(x.requires_grad_()).sum().backward()
            optimizer.step()
            clock.now += 0.25
        report = straggler_report(mine, mesh, link_bytes=64)
    finally:
        import time

        timers.clock = time.perf_counter
    assert type(mine) is PhaseTimers
    return report, timers._active


@pytest.mark.parametrize(
    ("shares", "seconds", "cause"),
    [((8, 8), (0.1, 1.0), "machine"), ((8, 56), (0.1, 0.1), "rows")],
    ids=["slow machine", "more tokens"],
)
def test_a_straggler_among_ranks(shares, seconds, cause):
    for report, active in run_ranks(step_on_a_clock, 2, list(shares), list(seconds)):
        assert active is None
        assert report.rows == [2 * n for n in shares]
        assert (report.rank, report.phase, report.cause) == (1, "experts", cause)
        assert report.seconds["experts"] == pytest.approx(
            [2 * n * s for n, s in zip(shares, seconds, strict=True)]
        )
        assert report.seconds["route"] == pytest.approx([0.5, 0.5])
        assert report.seconds["dense"] == pytest.approx([0.25, 0.25])
        assert set(report.seconds) == set(PHASES) > set(BUSY)
        assert report.link_seconds == [0.0, 0.0]


def test_laps_pauses_and_phases_inside_phases(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timers, "clock", clock)

    def take(seconds):
        clock.now += seconds

    with time_phases(torch.nn.Identity()) as mine:
        take(1.0)
        with timers.phase("experts", 3):
            take(2.0)
            with timers.phase("reduce wait"):
                take(4.0)
            with timers.phase("reduce wait"), timers.phase("route"):
                take(8.0)
            take(16.0)
        with mine.paused():
            take(100.0)
            with timers.phase("experts", 5):
                take(100.0)
        first = mine.lap()
        assert sum(mine.seconds.values()) == mine.rows == 0
        take(32.0)
        with timers.phase("experts", 1):
            take(64.0)
    nothing = dict.fromkeys(PHASES, 0.0)
    assert first.seconds == nothing | {"experts": 18.0, "reduce wait": 4.0, "route": 8.0, "dense": 1.0}
    assert mine.seconds == nothing | {"experts": 64.0, "dense": 32.0}
    assert (first.rows, mine.rows, timers._active) == (3, 1, None)


def test_a_threshold_that_blames_everybody_is_refused():
    with pytest.raises(InputError, match="threshold=1.0: expected a number > 1"):
        straggler_report(PhaseTimers(), None, threshold=1.0)
