"""The job names a rank that is slow, on clocks that only the test moves."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from flexpert.monitor.metrics import read_metrics
from flexpert.parallel import timers
from flexpert.parallel.timers import PHASES
from flexpert.testing import run_ranks
from flexpert.train import job
from flexpert.train.parallel import ManyRanks
from tests.train import vision_ranks as on_ranks

SETTINGS = [
    "model={preset: tiny, embed_dim: 16, depths: [1, 2], num_heads: [2, 2], pretrained_window_sizes: [0, 0],"
    " num_experts: 4}",
    "optimizer.batch_size=16",
    "optimizer.epochs=2",  # 6 steps
    "checkpoint_every=1",
    "log_every=2",
    "threads=1",
    "device=cpu",
    "parallel.plan={}",  # the same in every run: nothing is measured, nothing differs in the order of sums
]


class Clock:
    """Stands still until something takes its time."""

    now = 0.0

    def __call__(self):
        return self.now


def train_slowed(folder, settings, where):
    """The job, in which rank 1 needs 9 s for what takes rank 0 one; saving takes rank 0 long, and is no step.

    Returns what was said, too.
    """
    clock, said = Clock(), []
    prepare, write, collect = ManyRanks.prepare, job.tqdm.write, job.fit.__globals__["collect_state"]

    def take(seconds):
        clock.now += seconds

    def slowed(self, model):
        prepare(self, model)
        layer = next(module for module in model.modules() if hasattr(module, "router"))
        module = layer.experts if where == "experts" else model.get_submodule("swinv2.embeddings")
        seconds = 9.0 if dist.get_rank() else 1.0
        if where == "dense":
            module.register_forward_hook(lambda *_: take(seconds))
        else:
            rows = module.rows
            module.rows = lambda *args: (take(seconds), rows(*args))[1]

    def collected(*args):
        take(0.0 if dist.get_rank() else 1000.0)
        return collect(*args)

    timers.clock = clock
    ManyRanks.prepare, job.tqdm.write = slowed, lambda text, **_: said.append(text)
    job.fit.__globals__["collect_state"] = collected
    try:
        return on_ranks.run(folder, settings), said
    finally:
        timers.clock = time.perf_counter
        ManyRanks.prepare, job.tqdm.write = prepare, write
        job.fit.__globals__["collect_state"] = collect


@pytest.mark.parametrize("where", ["experts", "dense"])
def test_a_slow_rank_is_named_in_the_metrics_and_told_once(
    tmp_path: Path, tiny_fashion_mnist: Path, where: str
) -> None:
    settings = [*SETTINGS, f"data.folder={tiny_fashion_mnist}", f"output={tmp_path / 'runs'}"]
    (result, said), (_, silent) = run_ranks(train_slowed, 2, tiny_fashion_mnist, settings, where, timeout=300)
    lines = read_metrics(Path(result["run"]))
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["ranks"] == 2
        seconds = line["phase_seconds"]
        assert set(seconds) == set(PHASES)
        assert seconds.pop(where) == pytest.approx([2.0, 18.0])  # two steps
        assert all(row == pytest.approx([0.0, 0.0]) for row in seconds.values())
        assert line["straggler"].startswith(f"rank 1 is slow in {where}: 18 s, others 2 s; ")
    assert said == [lines[0]["straggler"]]
    assert silent == []
