"""Ranks started by the command itself: who speaks, who ends whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexpert.cli import main
from flexpert.core.errors import DistributedError
from flexpert.monitor.metrics import read_metrics
from flexpert.train.launch import launch
from tests.processes import sleeping, wait_for

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
# Found by the interpreter when it starts: what a test's folder has passes for the published images.
SITE = """
from tests.train import vision_ranks
vision_ranks.publish({folder!r})
"""
SMALL = [
    "model={preset: tiny, embed_dim: 16, depths: [1, 2], num_heads: [2, 2], pretrained_window_sizes: [0, 0],"
    " num_experts: 4}",
    "optimizer.batch_size=16",
    "optimizer.epochs=0.6",  # 2 steps
    "log_every=1",
    "device=cpu",
    "parallel.plan={}",  # the same in every run: nothing is measured, nothing differs in the order of sums
]


def program(*lines: str) -> list[str]:
    text = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    return [sys.executable, "-S", "-c", text + "\n".join(lines)]


def test_rank_0_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    code = (
        f"print(*(os.environ[name] for name in {names}))",
        "assert int(os.environ['MASTER_PORT']) > 0",
        "print('progress of', rank, file=sys.stderr)",
    )
    launch(program(*code), 3)
    assert capfd.readouterr() == ("0 0 3 3 127.0.0.1\n", "progress of 0\n")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_ends_all(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    monkeypatch.setattr("flexpert.train.launch.GRACE", 0.5)
    code = (f"if rank == {failing}: sys.exit('no such thing')", "os.execvp('sleep', ['sleep', '86411.5'])")
    with pytest.raises(DistributedError, match=f"rank {failing} of 2 ended with status 1"):
        launch(program(*code), 2)
    assert capfd.readouterr().err == ("rank 1: no such thing\n" if failing else "no such thing\n")
    assert not sleeping("86411.5")


def test_a_rank_that_is_killed_is_named() -> None:
    with pytest.raises(DistributedError, match="rank 1 of 2 ended by SIGKILL"):
        launch(program("if rank: os.kill(os.getpid(), signal.SIGKILL)"), 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_ranks_end_with_their_parent(number: signal.Signals) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells processes of their parent's end")
    seconds = f"86412.{int(number)}"
    code = (
        # A job in the background ignores it.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from flexpert.train.launch import launch; launch(['sleep', '{seconds}'], 2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: sleeping(seconds) == 2)
    finally:
        parent.send_signal(number)
        parent.communicate()
    assert parent.returncode != 0
    wait_for(lambda: sleeping(seconds) == 0)


def test_the_command_starts_its_ranks(
    tmp_path: Path,
    tiny_fashion_mnist: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "site").mkdir()
    site = SITE.format(folder=str(tiny_fashion_mnist))
    (tmp_path / "site" / "sitecustomize.py").write_text(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(CONFIG.parents[1])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    more = [f"data.folder={tiny_fashion_mnist}", f"output={tmp_path / 'runs'}"]
    assert main(["train", str(CONFIG), *SMALL, *more, "ranks=2", "--json"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result["steps"] == 2
    assert err.startswith(f"run {result['run']}: ")
    assert ", 2 ranks; images" in err
    assert len(read_metrics(Path(result["run"]))) == 2
    # As torchrun starts it, with a layout that cannot be: every rank says so.
    command = [sys.executable, "-m", "flexpert.train", str(CONFIG), *SMALL, *more, "parallel.replicas=3"]
    with pytest.raises(DistributedError, match="ended with status 2"):
        launch(command, 2)
    assert "error: replicas=3 does not divide 2 ranks; legal values are [1, 2]" in capfd.readouterr().err
