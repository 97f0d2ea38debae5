"""Several ranks compute what one process does: loss, gradients, figures, evaluation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from flexpert.core.errors import ConfigError, DistributedError
from flexpert.core.stats import RoutingStats
from flexpert.testing import assert_close, run_ranks
from flexpert.train.config import load_config
from flexpert.train.parallel import OneRank, join, weighted
from flexpert.train.task import StepResult
from tests.train import vision_ranks as on_ranks

SMALL = (
    "model={preset: tiny, embed_dim: 16, depths: [1, 2], num_heads: [2, 2], pretrained_window_sizes: [0, 0],"
    " num_experts: 4, capacity_factor: null}"
)


@pytest.fixture
def settings(tiny_fashion_mnist: Path) -> list[str]:
    return [SMALL, f"data.folder={tiny_fashion_mnist}", "data.shift=2", "device=cpu", "parallel.plan={}"]


@pytest.mark.parametrize(
    ("size", "batch", "accumulate", "more"),
    [
        (2, 12, 1, ["parallel.plan.r=0"]),
        (2, 15, 2, ["parallel.slices=2", "parallel.plan={r: 2, degree: 2}"]),
        (2, 1, 1, []),
        (2, 3, 2, ["parallel.dense=fsdp"]),
        (2, 15, 2, ["model.num_experts=0"]),
        (3, 16, 1, ["parallel.replicas=3"]),
    ],
    ids=["even", "micro_batches", "a_rank_without_images", "a_micro_batch_without", "dense", "three"],
)
def test_a_step_is_that_of_one_process(
    tiny_fashion_mnist: Path, settings: list[str], size: int, batch: int, accumulate: int, more: list[str]
) -> None:
    settings = [*settings, f"optimizer.batch_size={batch}", f"optimizer.accumulate={accumulate}", *more]
    figures, gradients, norm = on_ranks.step(tiny_fashion_mnist, settings)
    for got, others, other_norm in run_ranks(on_ranks.step, size, tiny_fashion_mnist, settings, timeout=300):
        assert_close(got.loss, figures.loss, 1e-6)
        assert got.metrics.keys() == figures.metrics.keys()
        for name, value in figures.metrics.items():
            assert_close(got.metrics[name], value, 1e-5, scale=1e-2, name=name)
        assert other_norm == pytest.approx(norm, rel=1e-5)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_close(others[name], gradient, 1e-4, scale=1e-4 * norm, name=name)
        for key, stats in figures.stats.items():
            assert got.stats[key].load_E.equal(stats.load_E)
            assert got.stats[key].tokens == stats.tokens


def test_micro_batches_keep_the_mean_loss(tiny_fashion_mnist: Path, settings: list[str]) -> None:
    dense = [*settings, "model.num_experts=0", "optimizer.batch_size=16"]
    whole, parts = (on_ranks.step(tiny_fashion_mnist, [*dense, f"optimizer.accumulate={n}"]) for n in (1, 3))
    assert_close(parts[0].loss, whole[0].loss, 1e-6)
    for name, gradient in whole[1].items():
        assert_close(parts[1][name], gradient, 1e-4, scale=1e-4, name=name)


@pytest.mark.parametrize("more", [["parallel.plan.r=0"], ["parallel.dense=fsdp"]], ids=["r=0", "r=1"])
def test_evaluation_is_that_of_one_process(
    tiny_fashion_mnist: Path, settings: list[str], more: list[str]
) -> None:
    settings = [*settings, "model.capacity_factor=0.5", *more]
    expected, load = on_ranks.measure(tiny_fashion_mnist, settings, 6)
    assert 0 < expected["drop_rate"] < 1
    for figures, shares in run_ranks(on_ranks.measure, 2, tiny_fashion_mnist, settings, 6, timeout=300):
        assert figures == pytest.approx(expected, abs=1e-12)
        assert shares.keys() == load.keys()
        assert all(sum(values) == pytest.approx(1) for values in shares.values())


def test_what_rank_0_decides_holds_everywhere() -> None:
    texts = ["", "runs/a-2", "Läufe/ß"]
    first, *others = run_ranks(on_ranks.decide, 2, texts, timeout=300)
    assert first == (texts, "ConfigError", "no such run")
    assert others == [(texts, "ConfigError", "rank 0: no such run")]
    assert OneRank().from_main(lambda: "text") == "text"


def test_ranks_that_are_not_there() -> None:
    one = load_config(on_ranks.CONFIG, ["ranks=2", "device=cpu"])
    message = "ranks=2, but this run has 1 .*flexpert train CONFIG ranks=2"
    with pytest.raises(DistributedError, match=message), join(one):
        pass


def test_ranks_with_unlike_settings_are_refused_before_anything_is_built() -> None:
    cases = [
        [["threads=1"], ["data.folder=elsewhere"]],
        [[], ["optimizer.epochs=7"]],
        [["model.num_experts=2"], []],
        [["parallel.plan={r: 0}"], ["parallel.plan={r: 1}"]],
        [["seed=3"], ["seed=4"]],
    ]
    for told in run_ranks(on_ranks.agree, 2, cases, timeout=300):
        assert told[0] == ""
        for text, name in zip(told[1:], ("optimizer.epochs", "model", "parallel.plan", "seed"), strict=True):
            assert re.match(rf"the training job: rank \d and rank \d differ in {name}: \S+ .*and ", text)


def test_a_layout_that_does_not_fit_leaves_no_run(
    tiny_fashion_mnist: Path, settings: list[str], tmp_path: Path
) -> None:
    settings = [*settings, "parallel.plan.r=2", f"output={tmp_path / 'runs'}"]
    with pytest.raises(DistributedError, match="plan: r=2 on a mesh with 1 slices"):
        run_ranks(on_ranks.run, 2, tiny_fashion_mnist, settings, timeout=300)
    assert not (tmp_path / "runs").exists()
    for wrong, message in {
        "parallel.plan.r=-1": "r=-1, expected an integer >= 0",
        "parallel.plan.speed=9": "unknown option 'speed'",
        "parallel.dense=zero": "parallel.dense='zero'",
        "parallel.replicas=0": "parallel.replicas=0",
        "parallel.slices=0": "parallel.slices=0",
        "ranks=0": "ranks=0: expected None or an integer >= 1",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config(on_ranks.CONFIG, [wrong])


def test_the_random_state_of_a_step() -> None:
    one, two = run_ranks(on_ranks.draw, 2, timeout=300)
    assert len({*one, *two}) == 4
    assert run_ranks(on_ranks.draw, 2, timeout=300) == [one, two]
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
