"""The job under the tuner: on several ranks by default, logged, saved, resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from flexpert.core.errors import ConfigError
from flexpert.monitor.metrics import read_metrics
from flexpert.parallel.together import Ranks
from flexpert.testing import run_ranks
from flexpert.train import tuning
from flexpert.train.checkpoint import latest_checkpoint, load_checkpoint
from flexpert.train.config import load_config
from flexpert.tune import Dictionary, Machine
from flexpert.tune.calibrate import machine_file
from flexpert.tune.presets import preset
from tests.train import vision_ranks as on_ranks
from tests.train.test_parallel_job import SMALL
from tests.tune.cases import machine_of


@pytest.fixture
def settings(tmp_path: Path, tiny_fashion_mnist: Path) -> list[str]:
    fixed = [text for text in SMALL if not text.startswith("parallel.plan")]
    return [
        *fixed,
        "optimizer.epochs=2.5",  # 10 steps
        f"data.folder={tiny_fashion_mnist}",
        f"output={tmp_path / 'runs'}",
    ]


def together(tmp_path, folder, settings, resume=False, cache="cache"):
    result = run_ranks(on_ranks.run_with_cache, 2, folder, settings, str(tmp_path / cache), resume)[0]
    return Path(result["run"])


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def state_of(run):
    return load_checkpoint(latest_checkpoint(run / "checkpoints")).state["tuner"]


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
    for line in read_metrics(run):
        ((plan, taken),) = line["plans"].items()  # of one step
        assert (plan, taken.pop("steps")) == (line["plan"], 1)
        assert taken.pop("tokens_per_second") > 0
        assert taken == {name: line[name] for name in ("bytes_inside", "bytes_between")}
    assert all("plans" not in line for line in read_metrics(static))
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
    known = state_of(run)
    (tmp_path / "file").write_text("", encoding="utf-8")  # under which no cache can be
    together(tmp_path, tiny_fashion_mnist, settings, resume=True, cache="file/cache")
    assert state_of(run)["machine"] == known["machine"]  # measured anew, the numbers would differ
    assert losses(run) == before
    again = plans_of(run)
    assert again == plans[-len(again) :]
    assert not any("trial" in line for line in plans)


def test_rates_of_another_dtype_join_what_is_known(monkeypatch, tmp_path):
    """So that a run in one dtype does not make another machine for those in the other."""
    mesh, rates = Mock(ranks_per_node=1), preset("a100-ndv4").rates
    known = machine_of(name="known", rates={"float32": rates["float32"]}, facts={"cpu": "x"})
    fresh = machine_of(name="fresh", rates={"bfloat16": rates["bfloat16"]}, facts={"cpu": "x"})
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "calibrate", lambda **options: fresh)
    monkeypatch.setattr(tuning, "stored", lambda mesh: known)
    found = tuning._machine(mesh, torch.bfloat16, Ranks())
    assert found == dataclasses.replace(known, rates=fresh.rates)
    both = Machine.from_json(machine_file({"cpu": "x"}).read_text(encoding="utf-8"))
    monkeypatch.setattr(tuning, "stored", lambda mesh: both)
    assert tuning._machine(mesh, torch.float32, Ranks()) == known
    assert tuning._machine(mesh, torch.bfloat16, Ranks()) == found


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path / "file" / "cache"))
    machine = machine_of(facts={"cpu": "x"})
    monkeypatch.setattr(tuning, "calibrate", lambda **options: machine)
    monkeypatch.setattr(tuning, "stored", lambda mesh: None)
    with caplog.at_level("WARNING", logger="flexpert"):
        assert tuning._machine(Mock(ranks_per_node=1), torch.float32, Ranks()) == machine
    assert "the machine's numbers: not kept for other runs: " in caplog.text
    assert "cannot be written" in caplog.text


def test_a_plan_is_auto_or_its_fields():
    assert load_config(on_ranks.CONFIG, []).parallel.plan == "auto"
    with pytest.raises(ConfigError, match="parallel.plan='fast'"):
        load_config(on_ranks.CONFIG, ["parallel.plan=fast"])
