"""Whole runs on shapes that take milliseconds."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from flexpert.bench import check_output, make_plan, plan, run_benchmark, write
from flexpert.bench import plot as plot_module
from flexpert.bench.problem import SHAPES
from flexpert.core.errors import ConfigError

KEYS = {
    "config", "dtype", "mode", "tokens", "implementation", "median_ms", "min_ms", "spread_percent",
    "repetitions", "peak_mib",
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    shapes = {
        name: dataclasses.replace(shape, tokens=shape.tokens // 64, model_dim=32, hidden_dim=32)
        for name, shape in SHAPES.items()
    }
    monkeypatch.setattr(plan, "SHAPES", shapes)


def test_quick(tiny):
    threads = torch.get_num_threads()
    result = run_benchmark(make_plan(quick=True, seconds=0.05))
    assert torch.get_num_threads() == threads
    assert result.keys() == {"machine", "configs", "rows", "routing", "unavailable"}
    assert result.keys() == json.loads(json.dumps(result, allow_nan=False)).keys()
    assert set(result["configs"]) == {"A", "B", "C", "D"}
    assert result["machine"]["backends"].keys() == {"fp32", "bf16"}
    modes = {(row["config"], row["mode"]) for row in result["rows"]}
    training = {(config, mode) for config in "ABC" for mode in ("forward", "forward+backward")}
    assert modes == training | {("D", "decode")}
    assert {row["tokens"] for row in result["rows"] if row["mode"] == "decode"} == {1, 8, 64}
    names = {row["implementation"] for row in result["rows"]}
    assert names == set(plan.QUICK) - {entry["implementation"] for entry in result["unavailable"]}
    for row in result["rows"]:
        percent = (
            {"percent_of_stream", "gb_per_s"} if row["mode"] == "decode" else {"percent_of_dense", "gflops"}
        )
        assert row.keys() == KEYS | percent
        assert row["repetitions"] >= 2
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert (row["peak_mib"] is None) == (row["mode"] != "forward+backward")
    shares = {(share["config"], share["mode"], share["tokens"]) for share in result["routing"]}
    assert shares == {(row["config"], row["mode"], row["tokens"]) for row in result["rows"]}
    by_key = {(r["config"], r["mode"], r["tokens"], r["implementation"]): r for r in result["rows"]}
    for (config, mode, tokens, _), row in by_key.items():
        name, key = ("stream", "percent_of_stream") if mode == "decode" else ("dense", "percent_of_dense")
        reference = by_key[config, mode, tokens, name]
        assert reference[key] == 100
        assert math.isclose(
            row[key], 100 * reference["median_ms"] / row["median_ms"], rel_tol=1e-3, abs_tol=0.06
        )


def custom(**flags):
    facts = {"tokens": 3, "model_dim": 7, "hidden_dim": 9, "experts": 5, "top_k": 3, "dtype": "fp32"} | flags
    return make_plan(custom=facts, seconds=0.05, memory=False)


@pytest.mark.parametrize(
    "flags",
    [
        {"tokens": 1, "experts": 1, "top_k": 1, "model_dim": 1, "hidden_dim": 1},
        {"capacity_factor": 0.01, "tokens": 33, "experts": 2, "top_k": 2, "dtype": "bf16"},
        {"expert": "glu", "activation": "relu"},
    ],
)
def test_odd_shapes_run_and_what_refuses_them_is_listed(flags):
    result = run_benchmark(custom(**flags))
    names = {row["implementation"] for row in result["rows"]}
    assert {"flexpert", "flexpert layer", "flexpert portable", "dense", "stream", "sort + loop"} <= names
    assert all(row["peak_mib"] is None for row in result["rows"])
    missing = {entry["implementation"]: entry["reason"] for entry in result["unavailable"]}
    assert names | missing.keys() == set(plan.IMPLEMENTATIONS)
    assert all("\n" not in reason for reason in missing.values())


def test_files(tmp_path, monkeypatch):
    result = run_benchmark(custom())
    stem = tmp_path / "deep" / "v1.2"
    check_output(stem)
    paths = write(result, stem)
    assert [path.name for path in paths] == ["v1.2.json", "v1.2.md", "v1.2.png"]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(result))
    page = paths[1].read_text()
    assert "T 3; D 7, F 9 (2 matrices, gelu), E 5, K 3, dropless." in page
    assert "- einsum (custom fp32): dispatch by einsum needs a capacity" in page
    assert "Router, dispatch and combine take of the layer's time: " in page
    header = next(line for line in page.splitlines() if line.startswith("| implementation | tokens"))
    flexpert = next(line for line in page.splitlines() if line.startswith("| flexpert | 3 |"))
    assert header.count("|") == flexpert.count("|")
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(plot_module.importlib.util, "find_spec", lambda name: None)
    assert [path.suffix for path in write(result, tmp_path / "x")] == [".json", ".md"]


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    """Where writing stops in the middle, the results of before are still there."""
    before = {name: f"{name} of before" for name in ("x.json", "x.md", "x.png")}
    for name, text in before.items():
        (tmp_path / name).write_text(text)

    def full(path, text, encoding):
        path.write_bytes(text[:9].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("flexpert.bench.run.markdown", lambda result: "")
    with pytest.raises(OSError, match="No space left"):
        write({"rows": []}, tmp_path / "x")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("stem", "why"),
    [
        ("file/x", "--output .*file/x: .*; give a path"),
        ("folder", "--output .*folder: it is a folder; name files in it, as .*folder/layer"),
        ("..", r"--output .*\.\.: it is a folder"),
        ("taken", "--output .*taken: .*taken.md: it is a folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path, stem, why):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.md").mkdir()
    with pytest.raises(ConfigError, match=why):
        check_output(tmp_path / stem)
