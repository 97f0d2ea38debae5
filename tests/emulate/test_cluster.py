"""Ranks: collectives are right, ends are reported, nothing waits forever and nothing stays."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flexpert.core.errors import InputError
from flexpert.emulate import Cluster, Outcome, RanksFailed
from tests.processes import PATIENCE, sleeping, wait_for

PR_SET_DUMPABLE = 4
NOBODY = 65534


def exchange(rows: int) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    sent = torch.arange(world * rows, dtype=torch.float64) + 1000 * rank
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return {"rank": rank, "node": int(os.environ["GROUP_RANK"]), "received": received}


@pytest.mark.parametrize("mode", ["switch", "bandwidth", "loopback"])
def test_a_gloo_all_to_all_is_right(mode: str, request: pytest.FixtureRequest, nothing_left: None) -> None:
    if mode != "loopback":
        request.getfixturevalue(f"{mode}_mode")
    latency = "200us" if mode == "switch" else None
    with Cluster(2, 2, bandwidth="1gbit", latency=latency, mode=mode) as cluster:
        values = cluster.run(exchange, 3)
    for rank, value in enumerate(values):
        assert (value["rank"], value["node"]) == (rank, rank // 2)
        want = [1000.0 * source + 3 * rank + row for source in range(4) for row in range(3)]
        assert value["received"].tolist() == want


def test_sixteen_ranks_start(switch_mode: str) -> None:
    def total() -> float:
        x = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(x)
        return x.item()

    with Cluster(4, 4, bandwidth="1gbit", latency="100us") as cluster:
        assert cluster.run(total) == [120.0] * 16
        assert cluster.run(total) == [120.0] * 16  # again, on the same nodes


def test_the_environment_is_that_of_torchrun() -> None:
    names = ["RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]

    def environment() -> list[str]:
        return [os.environ[name] for name in names]

    with Cluster(2, 3, mode="loopback") as cluster:
        values = cluster.run(environment, init=None)
    assert [value[:5] for value in values] == [
        [str(rank), str(rank % 3), str(rank // 3), "6", "3"] for rank in range(6)
    ]


def test_nodes_are_apart(shaped_mode: str) -> None:
    """Each has one device besides its loopback, and Reno where the system lets choose."""

    def facts() -> list[str]:
        devices = Path("/proc/net/dev").read_text().splitlines()[2:]
        names = sorted(line.split(":")[0].strip() for line in devices)
        return [*names, os.environ["GLOO_SOCKET_IFNAME"], os.environ["MASTER_ADDR"]]

    with Cluster(2, mode=shaped_mode) as cluster:
        for value in cluster.run(facts, init=None):
            assert {"eth0", "lo"} <= set(value)
            assert not {name for name in value if name.startswith(("p0", "p1", "br0"))}
            assert value[-2:] == ["eth0", "10.77.0.1"]


def sleep_but_rank_1(how: Callable[[], None]) -> None:
    if os.environ["RANK"] == "1":
        how()
    time.sleep(10 * PATIENCE)


def raise_error() -> None:
    raise ValueError("rank one has no luck")


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        (raise_error, 1, "ended with status 1"),
        (lambda: os._exit(9), 9, "ended with status 9"),
        (lambda: sys.exit(3), 3, "ended with status 3"),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), -signal.SIGUSR1, "was ended by SIGUSR1"),
    ],
)
def test_a_rank_that_fails_is_named_and_ends_the_others(
    how: Callable[[], None], code: int, words: str, nothing_left: None
) -> None:
    failing = pytest.raises(RanksFailed, match="4 of 4 ranks failed")
    with Cluster(2, 2, mode="loopback") as cluster, failing as failure:
        cluster.run(sleep_but_rank_1, how, init=None, timeout=PATIENCE, grace=0.05)
    assert f"rank 1 (node 0, local rank 1) {words}" in str(failure.value)
    outcomes = failure.value.outcomes
    assert [outcome.exit_code for outcome in outcomes] == [-signal.SIGTERM, code, *[-signal.SIGTERM] * 2]
    assert [outcome.ended_by_us for outcome in outcomes] == [
        "another rank failed",
        "",
        *["another rank failed"] * 2,
    ]
    if how is raise_error:
        assert "ValueError: rank one has no luck" in outcomes[1].output
        assert "ValueError: rank one has no luck" in str(failure.value)


def test_a_timeout_ends_all(nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a rank that does not listen to SIGTERM."""
    monkeypatch.setattr("flexpert.emulate.job.TERMINATION_SECONDS", 0.2)

    def stubborn() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ["RANK"] == "1" else signal.SIG_DFL)
        time.sleep(10 * PATIENCE)

    failing = pytest.raises(RanksFailed, match=r"rank 0 .* was ended \(timeout of 0.3 s\)")
    with Cluster(2, mode="loopback") as cluster, failing as failure:
        cluster.run(stubborn, init=None, timeout=0.3)
    assert [outcome.exit_code for outcome in failure.value.outcomes][1] in (-signal.SIGKILL, -signal.SIGTERM)


def test_what_cannot_travel_is_an_error_of_the_rank() -> None:
    with Cluster(1, mode="loopback") as cluster, pytest.raises(RanksFailed, match="a rank returned a set"):
        cluster.run(lambda: {1}, init=None)


def test_survivors_of_a_killed_rank_tell_what_they_saw(switch_mode: str) -> None:
    turns = multiprocessing.get_context("fork").Array("q", 4)

    def loop() -> str:
        x = torch.ones(4)
        try:
            while True:
                dist.all_reduce(x)
                turns[dist.get_rank()] += 1
        except RuntimeError:
            os._exit(0)  # a group with a dead member is not destroyed, it is left

    with Cluster(2, 2, latency="100us") as cluster:
        job = cluster.start(loop)
        wait_for(lambda: min(turns) > 3)
        cluster.kill(2)
        outcomes = job.wait(PATIENCE, keep_going=True)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0, -signal.SIGKILL, 0]
    assert outcomes[2].describe().startswith("rank 2 (node 1, local rank 0) was ended by SIGKILL")


def test_a_stopped_rank_stands_still_until_resumed() -> None:
    turns = multiprocessing.get_context("fork").Array("q", 3)

    def count() -> None:
        while turns[2] == 0:
            turns[int(os.environ["RANK"])] += 1
            time.sleep(0.001)

    with Cluster(2, mode="loopback") as cluster:
        job = cluster.start(count, init=None)
        wait_for(lambda: min(turns[:2]) > 0)
        cluster.stop(1)
        time.sleep(0.05)
        before = list(turns)
        wait_for(lambda: turns[0] > before[0] + 20)
        assert turns[1] == before[1]
        cluster.resume(1)
        wait_for(lambda: turns[1] > before[1])
        turns[2] = 1
        assert all(outcome.ok for outcome in job.wait(PATIENCE))


def start_runaways(word: str) -> None:
    """A child in the rank's group, and one in a session of its own."""
    for session in (False, True):
        subprocess.Popen(["sleep", word], start_new_session=session)


def test_after_an_exception_nothing_is_left(shaped_mode: str, nothing_left: None) -> None:
    word = f"{3000 + os.getpid()}.25"
    with pytest.raises(KeyError, match="mine"), Cluster(2, 2, mode=shaped_mode) as cluster:  # noqa: PT012
        cluster.start(lambda: (start_runaways(word), time.sleep(10 * PATIENCE))[0], init=None)
        wait_for(lambda: sleeping(word) == 8)
        raise KeyError("mine")
    wait_for(lambda: sleeping(word) == 0)


def test_what_ranks_left_behind_is_ended(shaped_mode: str) -> None:
    word = f"{3000 + os.getpid()}.75"
    with Cluster(2, mode=shaped_mode) as cluster:
        cluster.run(start_runaways, word, init=None)
    wait_for(lambda: sleeping(word) == 0)


def test_ranks_end_with_their_owner() -> None:
    """Even where it is killed, and can clean up nothing."""
    word = f"{3000 + os.getpid()}.125"

    def own() -> None:
        with Cluster(2, mode="auto") as cluster:
            cluster.run_command(["sleep", word])

    owner = multiprocessing.get_context("fork").Process(target=own)
    owner.start()
    wait_for(lambda: sleeping(word) == 2)
    owner.kill()
    owner.join()
    wait_for(lambda: sleeping(word) == 0)


def test_commands_run_once_per_rank_and_lines_have_places() -> None:
    lines = []
    with Cluster(2, 2, mode="loopback") as cluster:
        outcomes = cluster.run_command(
            ["sh", "-c", "echo out $RANK; echo err >&2; printf end; exit $LOCAL_RANK"],
            timeout=PATIENCE,
            echo=lambda place, stream, line: lines.append((place.prefix, stream, line)),
        )
    assert [outcome.exit_code for outcome in outcomes] == [0, 1, 0, 1]
    for rank, prefix in enumerate(["[0.0]", "[0.1]", "[1.0]", "[1.1]"]):
        own = [(stream, line) for place, stream, line in lines if place == prefix]
        assert sorted(own) == [(1, b"end\n"), (1, f"out {rank}\n".encode()), (2, b"err\n")]


def test_a_command_that_is_not_there() -> None:
    with Cluster(1, mode="loopback") as cluster:
        (outcome,) = cluster.run_command(["no-such-program-here"], timeout=PATIENCE)
        assert outcome.exit_code == 127
        assert "No such file" in outcome.output
        with pytest.raises(InputError, match=r"command=\[\]"):
            cluster.run_command([])


def test_ranks_have_numbers() -> None:
    with Cluster(2, mode="loopback") as cluster:
        with pytest.raises(InputError, match="no ranks run"):
            cluster.kill(0)
        job = cluster.start(time.sleep, 10 * PATIENCE, init=None)
        with pytest.raises(InputError, match="rank=2: the cluster has the ranks 0 to 1"):
            cluster.kill(2)
        cluster.kill(0)
        cluster.kill(1)
        assert [outcome.exit_code for outcome in job.wait(PATIENCE)] == [-signal.SIGKILL] * 2


def test_output_longer_than_a_pipe_is_read() -> None:
    with Cluster(1, mode="loopback") as cluster:
        (outcome,) = cluster.run_command(["sh", "-c", "seq 200000; echo last"], timeout=PATIENCE)
        assert outcome.ok
        assert outcome.output.endswith("200000\nlast\n")
        values = cluster.run(lambda: torch.arange(10**6), init=None)
        assert torch.equal(values[0], torch.arange(10**6))


@pytest.mark.skipif(os.geteuid() != 0, reason="every test runs without rights here")
def test_without_rights_there_is_bandwidth_or_loopback(bandwidth_mode: str) -> None:
    def unprivileged() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # as a process has it that was started without rights
        with Cluster(2, 2, bandwidth="100mbit") as cluster:
            values = cluster.run(exchange, 1)
            assert [value["received"].tolist() for value in values] == [
                [1000.0 * source + rank for source in range(4)] for rank in range(4)
            ]
            assert bool(cluster.missing) == (cluster.mode == "loopback")
            os._exit({"bandwidth": 10, "shape": 11, "switch": 12, "loopback": 13}[cluster.mode])

    process = multiprocessing.get_context("fork").Process(target=unprivileged)
    process.start()
    process.join()
    try:
        tried = subprocess.run(["unshare", "-rn", "true"], user=NOBODY, extra_groups=[], check=False)
        allowed = tried.returncode == 0
    except OSError:
        allowed = False
    assert process.exitcode in ((10, 11, 12) if allowed else (10, 11, 12, 13))


def test_outcomes_tell_who_was_first() -> None:
    from flexpert.emulate.environment import Place
    from flexpert.emulate.outcome import describe_failures

    def outcome(rank: int, code: int, seconds: float, why: str = "") -> Outcome:
        return Outcome(
            place=Place(rank, rank, 0),
            exit_code=code,
            seconds=seconds,
            ended_by_us=why,
            output=f"a\nlast {rank}\n",
        )

    assert describe_failures([outcome(0, 0, 1.0)]) == ""
    text = describe_failures(
        [
            outcome(0, 1, 2.0),
            outcome(1, 5, 1.0),
            outcome(2, -15, 3.0, "another rank failed"),
            outcome(3, 0, 1.0),
        ]
    )
    assert text == (
        "3 of 4 ranks failed. rank 1 (node 1, local rank 0) ended with status 5 after 1.0 s; last 1. "
        "rank 0 (node 0, local rank 0) ended with status 1 after 2.0 s; last 0"
    )


def test_a_rank_never_runs_its_owners_signal_handler() -> None:
    """It would unwind a copy of the owner, and clean up in its name."""

    def leave(number: int, frame: object) -> None:
        sys.exit(99)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with Cluster(1, 2, mode="loopback") as cluster:
            for _ in range(20):
                outcomes = cluster.start(time.sleep, 10 * PATIENCE, init=None).wait(0.0)
                assert [outcome.exit_code for outcome in outcomes] == [-signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)
