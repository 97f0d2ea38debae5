"""The command, on the loopback or what this machine can emulate: lines, exit status, faults, its end."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from flexpert.cli import main
from tests.processes import sleeping, wait_for

SCRIPT = """
import os, sys, json
import torch.distributed as dist
import beside
assert __name__ == "__main__"
dist.init_process_group("gloo")
gathered = [None] * dist.get_world_size()
dist.all_gather_object(gathered, os.environ["RANK"])
print("ranks", "".join(gathered), "arguments", *sys.argv[1:], beside.NAME)
dist.destroy_process_group()
sys.exit(4 if os.environ["RANK"] == "3" and "fail" in sys.argv else 0)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    (tmp_path / "program.py").write_text(SCRIPT)
    return str(tmp_path / "program.py")


def test_a_python_program_runs_in_every_rank(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ["--nodes", "2", "--ranks", "2", "--bandwidth", "1gbit"]
    assert main(["emulate", *cluster, "--", sys.executable, script, "--lr", "3"]) == 0
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    assert sorted(lines) == [f"[{k}.{i}] ranks 0123 arguments --lr 3 beside" for k in (0, 1) for i in (0, 1)]
    assert last.startswith("4 ranks ended well in ")
    assert "emulating 2 x 2 ranks, links of 1gbit 0us, mode " in err
    assert "hostname" not in err


def test_a_failing_rank_is_named_and_the_status_is_one(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["emulate", "--nodes", "2", "--ranks", "2", "--mode", "loopback", "--only-rank", "0"]
    assert main([*words, "--", sys.executable, script, "fail"]) == 1
    out, err = capsys.readouterr()
    first, last = out.splitlines()
    assert first == "[0.0] ranks 0123 arguments fail beside"
    assert last.startswith("1 of 4 ranks failed. rank 3 (node 1, local rank 1) ended with status 4 after ")
    assert err.count("not emulated: all ranks share one loopback") == 1


def test_a_module_is_found_from_the_current_folder(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["emulate", "--mode", "loopback", "--fork", "--json", "--", "python", "-m", "program", "-x"])
        == 0
    )
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "[1.0] ranks 01 arguments -x beside" in err
    assert (result["exit_status"], result["failures"], result["mode"]) == (0, "", "loopback")
    assert [(row["rank"], row["node"], row["exit_code"]) for row in result["outcomes"]] == [
        (0, 0, 0),
        (1, 1, 0),
    ]


def test_a_command_is_executed_in_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    script = 'echo "$RANK/$WORLD_SIZE $*" -- "$MALLOC_TOP_PAD_"'
    assert (
        main(["emulate", "--mode", "loopback", "--", "sh", "-c", script, "name", "-a", "--", "--json"]) == 0
    )
    out = capsys.readouterr().out
    assert {"[0.0] 0/2 -a -- --json -- 67108864", "[1.0] 1/2 -a -- --json -- 67108864"} < set(
        out.splitlines()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bandwidth", "200"], "bandwidth='200': expected a number and one of kbit, mbit, gbit"),
        (["--slow-node", "2"], "slow_node='2': expected NODE=RATE"),
        (["--slow-node", "2=1mbit"], "node 2 is none of the nodes 0 to 1"),
        (["--at", "1s", "cut"], "action 'cut' is unknown"),
        (["--at", "soon", "cut 1"], "at='soon'"),
        (["--only-rank", "2"], "only_rank=2: the cluster has the ranks 0 to 1"),
        (["--fork"], "fork: 'true' is not `python SCRIPT ...`"),
        (["--control", "/proc/none/fifo"], "control='/proc/none/fifo'"),
    ],
)
def test_wrong_options_are_status_two(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["emulate", "--mode", "loopback", *words, "--", "true"]) == 2
    assert message in capsys.readouterr().err


def test_a_timeout_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["emulate", "--mode", "loopback", "--timeout", "200ms", "--", "sleep", "1000"]
    assert main(words) == 1
    assert "rank 0 (node 0, local rank 0) was ended (timeout of 0.2 s)" in capsys.readouterr().out


def test_faults_on_time_and_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 0 is killed on time; rank 1 asks for its own end through the FIFO, after a wrong line."""
    fifo = tmp_path / "control"
    ask = f"[ $RANK = 0 ] || printf 'nonsense\\nkill 1\\n' > {fifo}; exec sleep 1000"
    words = ["emulate", "--mode", "loopback", "--at", "100ms", "kill 0", "--control", str(fifo)]
    assert main([*words, "--keep-going", "--", "sh", "-c", f"sleep 0.2; {ask}"]) == 1
    out, err = capsys.readouterr()
    assert "2 of 2 ranks failed. rank 0 (node 0, local rank 0) was ended by SIGKILL" in out
    assert "rank 1 (node 1, local rank 0) was ended by SIGKILL" in out
    assert "nonsense: action 'nonsense' is unknown" in err
    assert "kill 1: done" in err
    assert not fifo.exists()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_is_left_after_a_signal(number: signal.Signals, status: int, tmp_path: Path) -> None:
    word = f"{4000 + os.getpid()}.{int(number)}"
    fifo = tmp_path / "control"

    def command() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        words = ["emulate", "--nodes", "2", "--ranks", "2", "--bandwidth", "1gbit", "--control", str(fifo)]
        sys.exit(main([*words, "--", "sleep", word]))

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    wait_for(lambda: sleeping(word) == 4 and fifo.exists())
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status
    wait_for(lambda: sleeping(word) == 0)
    assert fifo.exists() == (number == signal.SIGKILL)
