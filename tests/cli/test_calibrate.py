"""The command that measures the machine."""

from __future__ import annotations

import json

import pytest

from flexpert.cli import main
from flexpert.tune import Machine

QUICK = ["calibrate", "--repeats", "1", "--model-dim", "8", "--hidden-dim", "16"]


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # what the command sets is gone after the test
        monkeypatch.delenv(name)


def test_one_process_measures_itself_into_a_file(tmp_path, capsys):
    path = tmp_path / "new" / "machine.json"
    assert main([*QUICK, "--dtypes", "float32", "bfloat16", "--out", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    machine = Machine.from_json(path.read_text(encoding="utf-8"))
    assert told == {"file": str(path), "machine": machine.to_dict()}
    assert list(machine.rates) == ["float32", "bfloat16"]
    assert (machine.sharing, machine.processors) == (1, None)


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["--out", "{folder}"], {}, "it is a folder"),
        (["--out", "{folder}/file/x.json"], {}, "cannot make"),
        (["--dtypes", "float31"], {}, "dtypes: 'float31'"),
        (["--repeats", "0"], {}, "repeats=0"),
        (["--hidden-dim", "-4"], {}, "hidden_dim=-4"),
        ([], {"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, LOCAL_WORLD_SIZE not: start the run with torchrun"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(
    arguments, environment, told, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("flexpert.tune.calibrate._rate", None)  # to measure would be another error
    assert main(["calibrate", *(text.format(folder=tmp_path) for text in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
