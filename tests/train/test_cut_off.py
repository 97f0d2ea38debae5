"""The job while a link is cut: each rank ends with an error that says so, and a resumed run goes on."""

from __future__ import annotations

import multiprocessing
import re
import time
from pathlib import Path

import pytest

import flexpert.train.vision  # noqa: F401 - imported once, before the ranks are forked
from flexpert.cli import main
from flexpert.emulate import Cluster
from flexpert.train import job, loop
from tests.parallel.test_cut import OUT_OF_REACH, lost
from tests.processes import wait_for
from tests.train import vision_ranks
from tests.train.test_lost_ranks import EXPERTS, SMALL, figures

LIMIT = 300.0
CUT_AT = 3  # of 6 steps; the last checkpoint is then that of step 2


@pytest.fixture
def settings(tmp_path: Path, tiny_fashion_mnist: Path) -> list[str]:
    more = [
        "checkpoint_every=2",
        "timeout=8",
        f"data.folder={tiny_fashion_mnist}",
        f"output={tmp_path / 'runs'}",
    ]
    return [EXPERTS, *SMALL, *more]


def test_a_node_cut_off_ends_all_ranks_and_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_plotter", lambda: "")  # importing matplotlib takes longer than the run
    waiting, cut = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def command(*arguments: str) -> None:
        raise SystemExit(main(["train", str(vision_ranks.CONFIG), *settings, *arguments]))

    def cut_in_the_middle() -> None:
        step = loop._step

        def watched(task, ranks, optimizer, config, number, total):  # type: ignore[no-untyped-def]
            if number == CUT_AT and ranks.world.rank == 1:  # the other rank waits for it in a collective
                time.sleep(0.5)
                waiting.set()
                cut.wait(LIMIT)
            return step(task, ranks, optimizer, config, number, total)

        loop._step = watched  # in this rank's process
        command()

    with Cluster(2) as cluster:
        if cluster.mode == "loopback":
            pytest.skip(f"no node can be cut off: {cluster.missing}")
        whole = cluster.start(command, "name=whole", init=None).wait(LIMIT)
        assert [outcome.exit_code for outcome in whole] == [0, 0], whole
        cut_job = cluster.start(cut_in_the_middle, init=None)
        wait_for(waiting.is_set)
        cluster.cut(1)
        cut.set()
        outcomes = cut_job.wait(LIMIT, keep_going=True)
        cluster.heal(1)
        resumed = cluster.start(command, "--resume", init=None).wait(LIMIT)
    for rank, (outcome, verdict) in enumerate(zip(outcomes, (lost(1), OUT_OF_REACH), strict=True)):
        assert (outcome.exit_code, outcome.ended_by_us) == (2, ""), outcome
        (line,) = [line for line in outcome.output.splitlines() if "flexpert train: error: " in line]
        where = rf"all_to_all on group 'expert parallel' \(ranks \(0, 1\), this is {rank}\) failed after "
        assert re.search(where, line), line
        assert re.search(verdict, line), line
    assert [outcome.exit_code for outcome in resumed] == [0, 0], resumed
    runs = [tmp_path / "runs" / name for name in ("job", "whole")]
    assert figures(runs[0]) == figures(runs[1])
    assert len(figures(runs[0])) == 6
    model = "model/model.safetensors"
    assert (runs[0] / model).read_bytes() == (runs[1] / model).read_bytes()
