"""Functions on several ranks: results in order, nothing shared, and failures told instead of hanging."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings

import pytest
import torch
from torch import distributed as dist

from flexpert import ConfigError, DistributedError
from flexpert.testing import RankPool, run_ranks


def place_and_sum(x, more):
    total = x + dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total + more, torch.get_num_threads(), os.getpid()


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_return_in_order_what_they_computed(world_size):
    results = run_ranks(place_and_sum, world_size, torch.ones(2, dtype=torch.float64), 0.5)
    assert [rank for rank, *_ in results] == list(range(world_size))
    want = torch.full((2,), sum(range(world_size)) + world_size + 0.5, dtype=torch.float64)
    for _, size, total, threads, _ in results:
        assert size == world_size
        assert torch.equal(total, want)
        assert threads == 1


def draw_and_group():
    groups = dist.distributed_c10d._world.pg_map
    dist.new_group([0])
    return len(groups), torch.rand(1)


def test_calls_share_processes_but_no_group_and_no_random_state():
    first, second = (
        run_ranks(place_and_sum, 2, torch.ones(1), 0),
        run_ranks(place_and_sum, 2, torch.ones(1), 0),
    )
    assert [pid for *_, pid in first] == [pid for *_, pid in second]
    assert len({pid for *_, pid in first} | {os.getpid()}) == 3
    assert run_ranks(draw_and_group, 2) == run_ranks(draw_and_group, 2)


def nothing():
    return torch.arange(3.0, requires_grad=True) * 2


def test_results_with_a_history_arrive_as_values():
    (result,) = run_ranks(nothing, 1)
    assert result.tolist() == [0, 2, 4]


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"no luck on {rank}")
    dist.barrier()


def test_a_failure_names_the_rank_first_and_shows_its_traceback():
    with pytest.raises(DistributedError) as caught:
        run_ranks(fail_on, 3, 1)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("test_ranks.fail_on on 3 ranks:")
    assert lines[1] == "--- rank 1 failed ---"
    assert "ValueError: no luck on 1" in lines
    assert any("in fail_on" in line for line in lines)
    # The others did not hang: they saw the first one leave.
    assert {"--- rank 0 failed ---", "--- rank 2 failed ---"} <= set(lines)
    assert len(run_ranks(nothing, 3)) == 3


def die(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_death_is_told():
    with pytest.raises(DistributedError, match="rank 0 failed ---\nthe process ended with SIGKILL"):
        run_ranks(die, 2, 0)


def sleep_on(rank):
    if dist.get_rank() == rank:
        time.sleep(600)


def test_a_hang_is_stopped_and_shown():
    with RankPool(2) as pool, pytest.raises(DistributedError) as caught:
        pool.run(sleep_on, 1, timeout=3.0)
    text = str(caught.value)
    assert "sleep_on on 2 ranks: not finished after 3 s" in text
    assert "--- rank 1 was stopped while at ---" in text
    assert "in sleep_on" in text
    assert "rank 0 was" not in text


def hold_a_lock():
    return threading.Lock()


def test_a_result_that_cannot_be_sent_is_a_failure():
    with pytest.raises(DistributedError, match="cannot pickle '_thread.lock'"):
        run_ranks(hold_a_lock, 1)


def warn():
    warnings.warn("careful", UserWarning, stacklevel=2)


def test_the_callers_filters_of_warnings_hold():
    with pytest.raises(DistributedError, match="UserWarning: careful"):
        run_ranks(warn, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert run_ranks(warn, 1) == [None]


def test_closing_ends_the_processes():
    with RankPool(1) as pool:
        ((*_, pid),) = pool.run(place_and_sum, torch.ones(1), 0)
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_ranks_are_refused():
    with pytest.raises(ConfigError, match="world_size=0; at least one rank is needed"):
        run_ranks(nothing, 0)
