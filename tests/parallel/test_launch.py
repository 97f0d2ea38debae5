"""Under torchrun: a killed rank's job goes on where it was saved."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from flexpert import DistributedError
from flexpert.parallel import expert_mesh, init_process_group
from flexpert.testing import run_ranks
from flexpert.testing.rank_process import LOOPBACK
from tests.parallel.elastic_job import losses, train

STEPS = 6


def uninterrupted(folder):
    train(Path(folder), STEPS)


@pytest.mark.slow
def test_a_killed_job_restarts_and_its_losses_are_those_of_an_uninterrupted_one(tmp_path):
    alone, restarted = tmp_path / "alone", tmp_path / "restarted"
    alone.mkdir()
    restarted.mkdir()
    run_ranks(uninterrupted, 2, str(alone))
    job = str(Path(__file__).with_name("elastic_job.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", job, str(restarted), str(STEPS), "3"]
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
    }
    if LOOPBACK in {name for _, name in socket.if_nameindex()}:
        environment["GLOO_SOCKET_IFNAME"] = LOOPBACK
    environment.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    result = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "exitcode: -9" in result.stderr
    assert losses(restarted) == losses(alone)
    assert len(losses(alone)) == STEPS
    assert losses(alone)[-1] < losses(alone)[0]


def test_outside_of_torchrun_the_missing_variables_are_named(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        DistributedError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set: start with tor"
    ):
        init_process_group("gloo")


def mesh_under_torchrun(shared):
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": shared, "TORCHELASTIC_MAX_RESTARTS": "3"}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            expert_mesh(2)
    finally:
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"], os.environ["TORCHELASTIC_MAX_RESTARTS"]
    return [str(each.message) for each in caught]


def test_a_job_that_could_not_restart_is_warned_of():
    told, silent = run_ranks(mesh_under_torchrun, 2, "True")
    assert len(told) == 1
    assert told[0].startswith(
        "torchrun --max-restarts 3 on gloo: restarted ranks would look for the killed ones"
    )
    assert silent == []
    assert run_ranks(mesh_under_torchrun, 2, "False") == [[], []]
