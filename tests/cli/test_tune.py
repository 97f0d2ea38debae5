"""The command that explains the tuner's choices."""

from __future__ import annotations

import json

import pytest

from flexpert.cli import main
from flexpert.core.plan import ExecutionPlan
from flexpert.tune.log import PlanLog
from tests.tune.test_dictionary import make


@pytest.fixture
def run_folder(tmp_path):
    make([0, 3]).save(tmp_path / "run" / "tuner.json")
    return tmp_path / "run"


def test_a_run_is_explained(run_folder, capsys):
    assert main(["tune", "--explain", str(run_folder)]) == 0
    out = capsys.readouterr().out
    assert "384..511 rows, even" in out
    assert "ranks 4" in out
    assert "faster than the first choice (r=1 degree=1 linear ragged)" in out
    assert " *r=2 degree=1 linear ragged" in out
    winner = next(line for line in out.splitlines() if line.startswith(" *"))
    assert winner.split()[-5:-3] == ["700.0", winner.split()[-4]]  # median milliseconds of a step
    assert out.count("settled") == 2


def test_json_and_files(run_folder, capsys):
    assert main(["tune", "--explain", str(run_folder / "tuner.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    bucket = found["dictionaries"][0]["buckets"][0]
    assert bucket["winner"] == "r=2 degree=1 linear ragged"
    assert [row["winner"] for row in bucket["candidates"]] == [True, False, False]
    assert bucket["candidates"][0]["against_first"] == pytest.approx(-0.3567, abs=1e-3)  # log 0.7


def test_the_cache_is_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path))
    assert main(["tune", "--explain"]) == 2
    assert "holds no dictionary yet" in capsys.readouterr().err
    make([1]).save(tmp_path / "tune" / "a.json")
    (tmp_path / "tune" / "machine.json").write_text("{}", encoding="utf-8")
    assert main(["tune", "--explain", "--limit", "1"]) == 0
    assert "and 2 more" in capsys.readouterr().out


def test_errors_in_one_line(tmp_path, capsys):
    assert main(["tune", "--explain", str(tmp_path)]) == 2
    assert "no tuner.json" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("[", encoding="utf-8")
    assert main(["tune", "--explain", str(tmp_path / "x.json")]) == 2
    assert "no JSON" in capsys.readouterr().err
    assert main(["tune", "--explain", str(tmp_path / "x.json"), "--limit", "0"]) == 2
    assert "limit=0" in capsys.readouterr().err


def test_one_bad_file_of_the_cache_does_not_hide_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path))
    make([1]).save(tmp_path / "tune" / "b.json")
    text = (tmp_path / "tune" / "b.json").read_text(encoding="utf-8")
    (tmp_path / "tune" / "a.json").write_text(text[:-50], encoding="utf-8")
    (tmp_path / "tune" / "c.json").write_bytes(b"\xff\xfe")  # no dictionary
    assert main(["tune", "--explain", "--json"]) == 0
    bad, good = json.loads(capsys.readouterr().out)["dictionaries"]
    assert "a.json: it is no JSON" in bad["error"]
    assert len(good["buckets"]) == 1
    assert main(["tune", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "not used" in out
    assert "128..255 rows" in out


def test_the_exploring_of_a_run_is_told(run_folder, capsys):
    log = PlanLog(run_folder / "plans.jsonl")
    for step in range(8):
        log.write(step, {"a": ExecutionPlan()}, trial=step in (3, 5))
    log.flush()
    assert main(["tune", "--explain", str(run_folder), "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "plans tried in 2 of 8 steps (25.0%)" in out
    assert "of plans predicted up to 1.20 times the best" in out
    assert "and 2 more, 2 of them tried" in out
