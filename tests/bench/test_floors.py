"""What bounds a layer."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from benchmarks.layer import floors, parts
from flexpert.bench.implementations import FORWARD, TRAINING
from flexpert.bench.problem import SHAPES, make_problem

SMALL = {"tokens": 64, "model_dim": 64, "hidden_dim": 96, "num_experts": 4, "top_k": 2}


def small(name: str, **changes: int):
    return dataclasses.replace(SHAPES[name], **{**SMALL, **changes})


def test_the_parts_have_the_work_of_the_layer():
    problem = make_problem(small("B"), torch.float32)
    forward = parts.parts_of(problem, trains=False, packed=False)
    training = parts.parts_of(problem, trains=True, packed=False)
    assert sum(part.flops for part in forward) == problem.flops
    assert sum(part.flops for part in training) == 3 * problem.flops
    weights, tokens, results = 4 * 3 * 64 * 96 * 4, 64 * 64 * 4, 64 * 2 * 64 * 4
    saved = 64 * 2 * 2 * 96 * 4
    assert sum(part.read for part in forward) == weights + tokens + results
    assert sum(part.written for part in forward) == results + tokens
    assert sum(part.read for part in training) == 2 * weights + 3 * tokens + 2 * results + saved
    assert sum(part.written for part in training) == weights + saved + 2 * results + 2 * tokens
    assert not any(part.weights for part in parts.parts_of(problem, trains=False, packed=True))


def test_bounds_of_times_that_are_known():
    problem = make_problem(small("C", top_k=1), torch.float32)
    listed = parts.parts_of(problem, trains=True, packed=False)
    ms = {"read of w1": 2.0, "read of w2": 3.0, "read of rows": 0.5, "fill of rows": 0.5, "asking": 5.0}
    for part in listed:
        ms |= {f"{part.title}, near": 0.25, f"{part.title}, far": 1.0}
        if part.flops:
            ms |= {f"{part.title}, product": 4.0, f"{part.title}, both": 4.1}
    ms["second product, both"] = 9.0
    rows_bytes = problem.id_TK.numel() * 64 * 4
    found = floors.bounds(ms, listed, rows_bytes, packed=False)
    moved = sum(part.read + part.written for part in listed if not part.weights) / rows_bytes * 0.5
    assert found.products == 24
    assert found.memory == pytest.approx(2 * (2 + 3) + 2 * 1.0 + moved)
    assert found.hidden == pytest.approx((4 + 2 - 5) / 2)
    one, two, three = found.levels
    assert one == 24
    assert two == pytest.approx(3 * 4.1 + 4.25 + 2 * 4.0 + found.memory)
    assert three == pytest.approx(24 + len(listed))


def test_widths_that_are_no_whole_blocks_are_refused():
    problem = make_problem(small("C", hidden_dim=90), torch.float32)
    with pytest.raises(ValueError, match="F 90: expected multiples of 32"):
        parts.Parts(None, problem, trains=False)


@pytest.mark.skipif(not floors.runs_on("bf16"), reason="has the blocks of AVX-512")
def test_the_tables_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(floors, "SHAPES", {"B": small("B")})
    path = tmp_path / "floors.md"
    command = ["floors", "--seconds", "0", "--configs", "B", "D", "--dtypes", "bf16", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    floors.main()
    text = path.read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    for name in (FORWARD + ", packed weights", TRAINING):
        milliseconds, percents = (line for line in text.splitlines() if line.startswith(f"| B bf16 {name} |"))
        cells = [cell.strip() for cell in milliseconds.split("|")[2:-1]]
        assert len(cells) == 9
        assert all(float(cell) >= 0 for place, cell in enumerate(cells) if place != 3)
        assert percents.split("|")[-2].strip() in {"reached", "below (b)", "above (b)"}
    titles = [
        part.title
        for part in parts.parts_of(make_problem(small("B"), torch.bfloat16), trains=True, packed=False)
    ]
    assert all(f"| {title} |" in text for title in titles)
    assert "| T = 64 |" in text
