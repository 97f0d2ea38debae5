"""A calibration runs on ranks, is equal on all of them, and is stored whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flexpert.core.errors import ConfigError
from flexpert.testing import run_ranks
from flexpert.tune import Machine
from flexpert.tune.calibrate import calibrate, machine_file, store
from flexpert.tune.least_squares import nonnegative
from tests.tune.cases import machine_of


def on_rank():
    return calibrate(ranks_per_node=2, repeats=1, model_dim=16, hidden_dim=32).to_json()


def test_ranks_agree_on_a_machine():
    texts = run_ranks(on_rank, 4)
    assert len(set(texts)) == 1
    machine = Machine.from_json(texts[0])
    assert machine.facts["nodes"] == 2
    assert machine.facts["ranks_per_node"] == 2
    assert machine.sharing == 4
    assert machine.rate("float32").rows[0] == 1
    assert machine.overheads.call > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [({"dtypes": ["float31"]}, "float31"), ({"repeats": 0}, "repeats=0"), ({"model_dim": 0}, "model_dim=0")],
)
def test_bad_arguments_are_refused_before_any_work(options, named):
    with pytest.raises(ConfigError, match=named):
        calibrate(**options)


def test_stored_whole_under_its_facts(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path))
    machine = machine_of(facts={"cpu": "x", "nodes": 2, "seconds": 3.0})
    path = store(machine)
    assert path == machine_file({"nodes": 2, "cpu": "x", "seconds": 9.0})  # however long it took
    assert path != machine_file({"nodes": 4, "cpu": "x"})
    store(dataclasses.replace(machine, name="newer"))
    assert Machine.from_json(path.read_text(encoding="utf-8")).name == "newer"
    assert list(path.parent.iterdir()) == [path]
    chosen = store(machine, tmp_path / "folder" / "m.json")
    assert Machine.from_json(chosen.read_text(encoding="utf-8")) == machine


def test_least_squares_without_negative_numbers():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    truth = torch.tensor([2.0, 0.0, 5.0], dtype=torch.float64)
    found = nonnegative(matrix.tolist(), (matrix @ truth).tolist())
    assert found == pytest.approx(truth.tolist(), abs=1e-9)
    # The plain solution is (3, -1).
    assert nonnegative([[1.0, 1.0], [1.0, 0.0]], [2.0, 3.0]) == pytest.approx([2.5, 0.0])
