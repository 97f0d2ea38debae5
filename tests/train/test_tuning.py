"""The job under the tuner: on several ranks by default, logged, saved, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flexpert.core.errors import ConfigError
from flexpert.monitor.metrics import read_metrics
from flexpert.testing import run_ranks
from flexpert.train.config import load_config
from flexpert.tune import Dictionary
from tests.train import vision_ranks as on_ranks
from tests.train.test_parallel_job import SMALL


@pytest.fixture
def settings(tmp_path: Path, tiny_fashion_mnist: Path) -> list[str]:
    fixed = [text for text in SMALL if not text.startswith("parallel.plan")]
    return [
        *fixed,
        "optimizer.epochs=2.5",  # 10 steps
        f"data.folder={tiny_fashion_mnist}",
        f"output={tmp_path / 'runs'}",
    ]


def together(tmp_path, folder, settings, resume=False):
    result = run_ranks(on_ranks.run_with_cache, 2, folder, settings, str(tmp_path / "cache"), resume)[0]
    return Path(result["run"])


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def plans_of(run):
    return [json.loads(line) for line in (run / "plans.jsonl").read_text(encoding="utf-8").splitlines()]


def test_plans_are_tuned_by_default_and_the_run_goes_on(tmp_path, tiny_fashion_mnist, settings):
    static = together(tmp_path, tiny_fashion_mnist, [*settings, "parallel.plan={}", "name=static"])
    run = together(tmp_path, tiny_fashion_mnist, [*settings, "parallel.slices=2"])
    assert losses(run) == pytest.approx(losses(static), rel=1e-5)
    plans = plans_of(run)
    assert [line["step"] for line in plans] == list(range(10))
    assert all(sum(map(len, line["plans"].values())) == 1 for line in plans)  # of one MoE layer
    assert read_metrics(run)[-1]["plan"].startswith("r=")
    known = Dictionary.read(run / "tuner.json")
    assert known.entries
    assert len(list((tmp_path / "cache" / "tune").glob("*.json"))) == 1
    assert len(list((tmp_path / "cache" / "machines").glob("*.json"))) == 1
    assert not (static / "plans.jsonl").exists()

    shutil.rmtree(max((run / "checkpoints").glob("step-*")))  # as if killed after step 9
    resumed = together(tmp_path, tiny_fashion_mnist, [*settings, "parallel.slices=2"], resume=True)
    assert resumed == run
    assert losses(run) == pytest.approx(losses(static), rel=1e-5)
    assert [line["plans"] for line in plans_of(run)] == [line["plans"] for line in plans]


def test_deterministic_plans_repeat_bit_for_bit(tmp_path, tiny_fashion_mnist, settings):
    settings = [*settings, "parallel.slices=2", "parallel.deterministic=true"]
    run = together(tmp_path, tiny_fashion_mnist, settings)
    before, plans = losses(run), plans_of(run)
    (run / "plans.jsonl").unlink()  # nothing to replay
    shutil.rmtree(max((run / "checkpoints").glob("step-*")))
    together(tmp_path, tiny_fashion_mnist, settings, resume=True)
    assert losses(run) == before
    again = plans_of(run)
    assert again == plans[-len(again) :]
    assert not any("trial" in line for line in plans)


def test_a_plan_is_auto_or_its_fields():
    assert load_config(on_ranks.CONFIG, []).parallel.plan == "auto"
    with pytest.raises(ConfigError, match="parallel.plan='fast'"):
        load_config(on_ranks.CONFIG, ["parallel.plan=fast"])
