"""The grid of sizes."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.layer import shapes


def test_a_part_is_measured_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "CELL_SECONDS", 0.001)
    only = "T64 D64 F64 E64 K1 fp32"
    command = ["shapes", "--output", str(tmp_path / "out"), "--only", only, "--seconds", "600"]
    threads = torch.get_num_threads()
    try:
        for seconds in ("600", "0"):  # the second time nothing is measured, and nothing lost
            monkeypatch.setattr(sys, "argv", [*command[:-1], seconds])
            shapes.main()
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]
    assert [row["cell"] for row in rows] == [f"{only} 2 threads", f"{only} 2 threads skewed"]
    assert all(
        row[mode][name] > 0
        for row in rows
        for mode in ("forward", "forward+backward")
        for name in shapes.NAMES
    )
    assert f"| {only} 2 threads skewed |" in (tmp_path / "out.md").read_text(encoding="utf-8")
    assert "2 cells measured, 2 left" in capsys.readouterr().out


def test_cells_differ():
    keys = [cell.key for cell in shapes.cells()]
    assert len(set(keys)) == len(keys)


def test_skewed_cells_give_all_tokens_to_the_first_experts():
    cell = next(cell for cell in shapes.cells() if cell.is_skewed)
    assert cell.problem().id_TK.unique().tolist() == list(range(cell.shape.top_k))
