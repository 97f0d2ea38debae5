"""The job when a rank is lost: the others say who it was, and torchrun goes on where it was saved."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from flexpert.core.errors import DistributedError
from flexpert.monitor.metrics import read_metrics
from flexpert.testing import run_ranks
from flexpert.testing.rank_process import LOOPBACK
from flexpert.train import loop
from tests.parallel.worlds import run_world
from tests.train import vision_ranks as on_ranks

MODEL = "preset: tiny, embed_dim: 16, depths: [1, 2], num_heads: [2, 2], pretrained_window_sizes: [0, 0]"
SMALL = [
    "optimizer.batch_size=16",
    "optimizer.epochs=2",  # 6 steps
    "checkpoint_every=3",
    "checkpoint_async=false",
    "log_every=1",
    "threads=1",
    "device=cpu",
    "parallel.plan={}",  # the same in every run: nothing is measured, nothing differs in the order of sums
    "name=job",
]
EXPERTS = f"model={{{MODEL}, num_experts: 4}}"
DENSE = f"model={{{MODEL}, num_experts: 0}}"
# Found by the interpreter when it starts. Rank 1 kills itself: in its first life before a checkpoint, in its
# second after one. Rank 0 writes down the steps of each life.
SITE = """
import os, signal, sys
if "RANK" in os.environ:
    from tests.train import vision_ranks
    from flexpert.train import loop
    vision_ranks.publish({folder!r})
    life, step = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), loop._step
    def watched(task, ranks, optimizer, config, number, total):
        if ranks.world.rank == 1 and (life, number) in ((0, 2), (1, 4)):
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.world.rank == 0:
            with open({steps!r}, "a") as file:
                file.write(f"{{life}} {{number}}\\n")
        return step(task, ranks, optimizer, config, number, total)
    loop._step = watched
"""


@pytest.fixture
def settings(tmp_path: Path, tiny_fashion_mnist: Path) -> list[str]:
    return [*SMALL, f"data.folder={tiny_fashion_mnist}", f"output={tmp_path / 'runs'}"]


def figures(run: Path) -> list[dict[str, object]]:
    """The lines of metrics without what a clock told."""
    timed = {"seconds", "tokens_per_second", "phase_seconds", "straggler"}
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(run)]


@pytest.mark.slow
def test_torchrun_restarts_the_run_it_began_and_its_curve_is_that_of_an_uninterrupted_one(
    tmp_path: Path, tiny_fashion_mnist: Path, settings: list[str]
) -> None:
    settings = [EXPERTS, *settings]
    whole = Path(run_ranks(on_ranks.run, 2, tiny_fashion_mnist, settings, timeout=300)[0]["run"])
    (tmp_path / "site").mkdir()
    steps = tmp_path / "steps"
    site = SITE.format(folder=str(tiny_fashion_mnist), steps=str(steps))
    (tmp_path / "site" / "sitecustomize.py").write_text(site)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), str(root)])
    if LOOPBACK in {name for _, name in socket.if_nameindex()}:
        environment["GLOO_SOCKET_IFNAME"] = LOOPBACK
    environment.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "-m", "flexpert.train", str(on_ranks.CONFIG), *settings, "--json"]
    result = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=580, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    # The name was taken: every life goes on with the folder that the first one made.
    restarted = whole.with_name("job-2")
    assert Path(json.loads(result.stdout)["run"]) == restarted
    assert sorted(path.name for path in whole.parent.iterdir()) == ["job", "job-2"]
    lives = [tuple(map(int, line.split())) for line in steps.read_text().splitlines()]
    seen = {life: [step for of, step in lives if of == life] for life in range(3)}
    assert seen[0][0] == seen[1][0] == 0
    assert seen[2] == [3, 4, 5]
    assert figures(restarted) == figures(whole)
    assert [line["step"] for line in figures(whole)] == list(range(1, 7))
    assert ", 2 ranks, restart 2; images" in result.stderr
    model = "model/model.safetensors"
    assert (restarted / model).read_bytes() == (whole / model).read_bytes()


def lose_one(folder, settings, number, port):
    """What rank 0 is told of rank 1, which gets a signal before step 2; the job makes its group itself."""
    rank, step = str(dist.get_rank()), loop._step
    dist.destroy_process_group()
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def watched(*args):
        if rank == "1" and args[4] == 2:
            os.kill(os.getpid(), number)
        return step(*args)

    loop._step = watched
    try:
        on_ranks.run(folder, settings)
    except DistributedError as error:
        return str(error)


@pytest.mark.parametrize(
    ("more", "number", "what"),
    [
        ([EXPERTS], signal.SIGKILL, r".*experts: all_to_all on group 'expert parallel' \(ranks \(0, 1\)"),
        (
            [EXPERTS, "timeout=10"],
            signal.SIGSTOP,
            r".*experts: all_to_all on group 'expert parallel' \(ranks \(0, 1\)",
        ),
        ([DENSE], signal.SIGKILL, r"dense part \(DDP\): all_reduce on group 'all ranks' \(ranks \(0, 1\)"),
    ],
    ids=["killed", "stopped", "dense"],
)
def test_a_lost_rank_is_named(tiny_fashion_mnist: Path, settings, more, number, what) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    text = run_world(lose_one, 2, tiny_fashion_mnist, [*settings, *more], number, port, lost=[1])[0]
    assert re.match(what, text), text
    assert "rank 1 is lost: no sign of life for" in text
