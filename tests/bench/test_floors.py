"""What bounds a layer."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from benchmarks.layer import floors
from flexpert.bench.problem import SHAPES, make_problem

SMALL = {"tokens": 64, "model_dim": 64, "hidden_dim": 96, "num_experts": 4, "top_k": 2}


def small(name: str, **changes: int):
    return dataclasses.replace(SHAPES[name], **{**SMALL, **changes})


def test_traffic_counts_weights_tokens_and_what_is_saved():
    problem = make_problem(small("B"), torch.float32)
    weights, tokens, saved = 4 * 3 * 64 * 96 * 4, 64 * 64 * 4, 64 * 2 * 2 * 96 * 4
    assert floors.traffic(problem, trains=False) == (weights + tokens, tokens)
    assert floors.traffic(problem, trains=True) == (
        2 * weights + saved + 3 * tokens,
        weights + saved + 2 * tokens,
    )


def test_products_are_those_of_the_layer():
    problem = make_problem(small("B"), torch.float32)
    work: list[int] = []

    def rate(rows: int, size: int, columns: int) -> float:
        work.append(2 * rows * size * columns)
        return 0.0

    floors.product_ms(problem, rate, trains=False)
    assert 4 * sum(work) == problem.flops
    work.clear()
    floors.product_ms(problem, rate, trains=True)
    assert 4 * sum(work) == 3 * problem.flops


@pytest.mark.skipif(
    floors.build.native().instructions(torch.bfloat16) == "AVX2", reason="has the blocks of AVX-512"
)
def test_the_tables_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(floors, "SHAPES", {"B": small("B")})
    path = tmp_path / "floors.md"
    command = ["floors", "--seconds", "0", "--configs", "B", "D", "--dtypes", "bf16", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    floors.main()
    text = path.read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    for name in ("| B bf16 forward |", "| B bf16 forward+backward |", "| D bf16, T = 64 |"):
        row = next(line for line in text.splitlines() if line.startswith(name))
        assert all(float(cell) >= 0 for cell in row.split("|")[-3:-1] if "to" not in cell)
