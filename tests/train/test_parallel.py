"""Several ranks compute what one process does: loss, gradients, figures, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexpert.core.errors import ConfigError, DistributedError
from flexpert.core.stats import RoutingStats
from flexpert.testing import assert_close
from flexpert.train.config import TrainConfig, load_config
from flexpert.train.parallel import ManyRanks, OneRank, weighted
from flexpert.train.task import StepResult
from flexpert.train.vision import VisionTask
from flexpert.train.world import World
from tests.ranks import run_ranks

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
SMALL = (
    "model={preset: tiny, embed_dim: 16, depths: [1, 2], num_heads: [2, 2], pretrained_window_sizes: [0, 0],"
    " num_experts: 4, capacity_factor: null}"
)


@pytest.fixture
def settings(tiny_fashion_mnist: Path) -> list[str]:
    return [SMALL, f"data.folder={tiny_fashion_mnist}", "data.shift=2", "device=cpu"]


def config(settings: list[str], *more: str) -> TrainConfig:
    return load_config(CONFIG, [*settings, *more])


def task_of(given: TrainConfig, ranks: OneRank | None = None) -> VisionTask:
    torch.manual_seed(0)
    return VisionTask(given, ranks=ranks)


def on_ranks(given: TrainConfig, size: int, work: Callable[[VisionTask, OneRank], Any]) -> list[Any]:
    """Results of `work(task, ranks)` on every rank; the tasks are made one after the other."""
    tasks = [task_of(given) for _ in range(size)]

    def run(rank: int, all_reduce: Callable[[Tensor], Tensor]) -> Any:
        ranks = ManyRanks(World(rank, size, rank, size), total=all_reduce)
        tasks[rank].ranks = ranks
        return work(tasks[rank], ranks)

    return run_ranks(size, run)


def step(task: VisionTask, ranks: OneRank) -> tuple[StepResult, dict[str, Tensor], float]:
    """Figures, gradients and their norm of step 4."""
    task.model.train()
    parts = task.config.optimizer.accumulate
    results = []
    for part in range(parts):
        results.append(task.loss(4, part, parts))
        ranks.backward(task.model, results[-1].loss, last=part == parts - 1)
    gradients = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
    norm = ranks.clip_grad_norm(task.model, 1e-3)
    return ranks.figures(StepResult.merged(results)), gradients, float(norm)


@pytest.mark.parametrize(
    ("size", "batch", "accumulate"),
    [(2, 12, 1), (3, 16, 1), (3, 16, 3), (3, 2, 1), (2, 3, 2)],
    ids=["even", "uneven", "micro_batches", "a_rank_without_images", "a_micro_batch_without"],
)
def test_a_step_is_that_of_one_process(settings: list[str], size: int, batch: int, accumulate: int) -> None:
    more = (f"optimizer.batch_size={batch}", f"optimizer.accumulate={accumulate}")
    given = config(settings, *more)
    alone = task_of(given)
    figures, gradients, norm = step(alone, alone.ranks)
    for got, others, other_norm in on_ranks(given, size, step):
        assert_close(got.loss, figures.loss, 1e-6)
        assert got.metrics.keys() == figures.metrics.keys() == {"accuracy", "importance_load"}
        for name, value in figures.metrics.items():
            assert_close(got.metrics[name], value, 1e-5, scale=1e-2, name=name)
        assert other_norm == pytest.approx(norm, rel=1e-5)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_close(others[name], gradient, 1e-4, scale=1e-4 * norm, name=name)
        for key, stats in figures.stats.items():
            assert got.stats[key].load_E.equal(stats.load_E)
            assert got.stats[key].tokens == stats.tokens


def test_micro_batches_keep_the_mean_loss(settings: list[str]) -> None:
    quiet = SMALL.replace("num_experts: 4", "num_experts: 0")
    losses, grads = [], []
    for accumulate in (1, 3):
        given = config(
            [quiet, *settings[1:]], "optimizer.batch_size=16", f"optimizer.accumulate={accumulate}"
        )
        task = task_of(given)
        figures, gradients, _ = step(task, task.ranks)
        losses.append(figures.loss)
        grads.append(gradients)
    assert_close(losses[1], losses[0], 1e-6)
    for name, gradient in grads[0].items():
        assert_close(grads[1][name], gradient, 1e-4, scale=1e-4, name=name)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_evaluation_is_that_of_one_process(settings: list[str], size: int) -> None:
    given = config(settings, "model.capacity_factor=0.5")
    alone = task_of(given)
    expected, load = alone.evaluate(batch_size=6), alone.load()
    assert 0 < expected["drop_rate"] < 1
    for figures, shares in on_ranks(given, size, lambda task, _: (task.evaluate(batch_size=6), task.load())):
        assert figures == pytest.approx(expected, abs=1e-12)
        assert shares.keys() == load.keys()
        assert all(sum(values) == pytest.approx(1) for values in shares.values())


def test_a_parameter_without_gradient_keeps_none() -> None:
    models = [nn.ParameterList([nn.Parameter(torch.ones(2, 3)) for _ in range(3)]) for _ in range(2)]

    def work(rank: int, all_reduce: Callable[[Tensor], Tensor]) -> None:
        one, two, _ = models[rank]
        loss = one.sum() * (rank + 1) + (two.sum() if rank else 0.0)
        ManyRanks(World(rank, 2), total=all_reduce).backward(models[rank], loss, last=True)

    run_ranks(2, work)
    for one, two, unused in models:
        assert one.grad is not None
        assert two.grad is not None
        assert one.grad.equal(torch.full((2, 3), 1.5))  # the mean of 1 and 2
        assert two.grad.equal(torch.full((2, 3), 0.5))
        assert unused.grad is None


@pytest.mark.parametrize("text", ["", "runs/a-2", "Läufe/ß"])
def test_what_rank_0_decides_holds_everywhere(text: str) -> None:
    def work(rank: int, all_reduce: Callable[[Tensor], Tensor]) -> str:
        return ManyRanks(World(rank, 3), total=all_reduce).from_main(
            lambda: text if rank == 0 else "not asked"
        )

    assert run_ranks(3, work) == [text] * 3
    assert OneRank().from_main(lambda: text) == text


def test_an_error_on_rank_0_ends_all() -> None:
    seen = []

    def work(rank: int, all_reduce: Callable[[Tensor], Tensor]) -> None:
        def make() -> str:
            raise ConfigError("no such run")

        error = DistributedError if rank else ConfigError
        with pytest.raises(error, match="rank 0 failed: no such run" if rank else "^no such run"):
            ManyRanks(World(rank, 2), total=all_reduce).from_main(make)
        seen.append(rank)

    run_ranks(2, work)
    assert sorted(seen) == [0, 1]


def test_the_random_state_of_a_step() -> None:
    def draw(rank: int, number: int) -> float:
        ManyRanks(World(rank, 2)).seed(7, number)
        return float(torch.rand(()))

    values = [draw(rank, number) for rank in (0, 1) for number in (0, 1)]
    assert len(set(values)) == 4
    assert draw(1, 0) == values[2]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    OneRank().seed(7, 0)
    assert torch.get_rng_state().equal(before)  # one process goes on with its stream


def test_a_weight_of_one_changes_nothing() -> None:
    value = torch.rand(())
    assert weighted(value, 1) is value
    assert weighted(value, 0.5) == value / 2


def test_results_of_micro_batches_add_up() -> None:
    def stats(rows: list[float]) -> RoutingStats:
        load, zero = torch.tensor(rows), torch.zeros(())
        return RoutingStats(
            load_E=load,
            selected_E=load,
            tokens=load.sum(),
            dropped=zero,
            entropy=zero,
            max_violation=zero,
            capacity=zero,
        )

    parts = [
        StepResult(
            torch.tensor(x, requires_grad=True), {"a": torch.tensor(2 * x)}, {("l", 0): stats([x, 1.0])}
        )
        for x in (1.0, 2.0)
    ]
    merged = StepResult.merged(parts)
    assert (float(merged.loss), float(merged.metrics["a"])) == (3.0, 6.0)
    assert not merged.loss.requires_grad
    assert merged.stats[("l", 0)].load_E.tolist() == [3, 2]
    assert merged.stats[("l", 0)].max_violation == pytest.approx(0.2)
