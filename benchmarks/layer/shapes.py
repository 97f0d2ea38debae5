"""The fused operator over a grid of sizes: native beside portable and dense.

    python -m benchmarks.layer.shapes [--seconds 50] [--output benchmarks/layer/results/shapes] [--only TEXT]

Measures what the output file does not have yet, for about that many seconds, and writes STEM.json and
STEM.md: run it again until it says that nothing is left. What takes too much memory or time for a grid is
left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from flexpert.bench.implementations import FORWARD, OURS, REFERENCES, TRAINING, Implementation
from flexpert.bench.machine import machine_facts
from flexpert.bench.measure import interleave, prepare, summary
from flexpert.bench.problem import DTYPES, Problem, Shape, make_problem

TOKENS = (1, 64, 1000, 16384, 65536)
WIDTHS = ((64, 64), (200, 200), (1000, 1000), (64, 4096), (4096, 64), (4096, 4096))  # D, F
EXPERTS = ((1, 1), (8, 1), (8, 2), (64, 1), (64, 8), (256, 2), (256, 8))  # E, K
MOST_FLOPS, MOST_BYTES = 1e10, 3e8  # of a forward pass; of the weights
CELL_SECONDS = 0.15
NAMES = ("flexpert", "flexpert portable", "dense")


@dataclass(frozen=True)
class Cell:
    """One shape; SKEWED: the first K experts get all tokens."""

    shape: Shape
    dtype: str
    threads: int
    is_skewed: bool = False

    @property
    def key(self) -> str:
        """As it is called in the result."""
        s = self.shape
        return (
            f"T{s.tokens} D{s.model_dim} F{s.hidden_dim} E{s.num_experts} K{s.top_k} {self.dtype} "
            f"{self.threads} thread{'s'[: self.threads > 1]}{' skewed' if self.is_skewed else ''}"
        )

    def problem(self) -> Problem:
        """Its inputs."""
        found = make_problem(self.shape, DTYPES[self.dtype])
        if self.is_skewed:
            ids = torch.arange(self.shape.top_k).expand(self.shape.tokens, -1).contiguous()
            found = dataclasses.replace(found, id_TK=ids)
        return found


def cells() -> Iterator[Cell]:
    """The grid on all threads; all tokens to one expert; one thread."""
    shapes = [
        Shape(
            tokens=tokens, model_dim=model, hidden_dim=hidden, num_experts=experts, top_k=k,
            capacity_factor=None, gated=False, activation="gelu",
        )
        for tokens in TOKENS
        for model, hidden in WIDTHS
        for experts, k in EXPERTS
    ]  # fmt: skip
    for shape in shapes:
        weights = shape.num_experts * shape.expert_size
        work = 2 * shape.tokens * shape.top_k * shape.expert_size
        if work > MOST_FLOPS or 4 * weights > MOST_BYTES:
            continue
        for dtype in DTYPES:
            yield Cell(shape, dtype, 2)
            if shape.num_experts == 64 and shape.top_k == 1:
                yield Cell(shape, dtype, 2, is_skewed=True)
            if shape.num_experts == 8 and shape.top_k == 2:
                yield Cell(shape, dtype, 1)


def implementations() -> list[Implementation]:
    """What is compared."""
    return [item for item in (*OURS, *REFERENCES) if item.name in NAMES]


def measure(cell: Cell) -> dict[str, Any]:
    """Medians in milliseconds by mode and implementation."""
    torch.set_num_threads(cell.threads)
    problem = cell.problem()
    row: dict[str, Any] = {"cell": cell.key}
    for mode in (FORWARD, TRAINING):
        runs = {item.name: prepare(item, problem, mode) for item in implementations()}
        times = interleave(runs, CELL_SECONDS)
        row[mode] = {name: summary(values)["median_ms"] for name, values in times.items()}
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: milliseconds of native, its speed as a multiple of portable's and as percent of dense."""
    lines = [
        "| cell | forward ms | x portable | % of dense | fwd+bwd ms | x portable | % of dense |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells_of_row = [row["cell"]]
        for mode in (FORWARD, TRAINING):
            native, portable, dense = (row[mode][name] for name in NAMES)
            cells_of_row += [f"{native:.3g}", f"{portable / native:.2f}", f"{100 * dense / native:.0f}"]
        lines.append(f"| {' | '.join(cells_of_row)} |")
    return lines


def slower(row: dict[str, Any]) -> bool:
    """Whether portable beats native by more than noise."""
    return any(row[mode][NAMES[0]] > 1.1 * row[mode][NAMES[1]] for mode in (FORWARD, TRAINING))


def write(stem: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """STEM.json and STEM.md."""
    result = {"machine": machine, "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    found = [row for row in rows if slower(row)]
    text = [
        "# The fused operator over a grid of sizes",
        "",
        "Dropless MLP experts with gelu. x portable: how many times as fast as the portable backend;",
        "100 % of dense: two plain products with the same FLOPs, which read the weights of one expert,",
        "however many there are. Skewed: the first K experts get all tokens.",
        f"{machine['cpu']}, PyTorch {machine['torch']}.",
        "",
        f"## Slower than portable by more than a tenth: {len(found)} of {len(rows)}",
        "",
        *table(found),
        "",
        "## All",
        "",
        *table(rows),
    ]
    stem.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is missing, then write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "shapes")
    parser.add_argument("--only", default="", help="measure cells whose name has this text, again if need be")
    options = parser.parse_args()
    path = options.output.with_suffix(".json")
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {row["cell"]: row for row in known}
    begin, missing = time.perf_counter(), 0
    for cell in sorted(cells(), key=lambda cell: crc32(cell.key.encode())):  # a part is a sample of all
        if options.only not in cell.key or (not options.only and cell.key in rows):
            continue
        if time.perf_counter() - begin > options.seconds:
            missing += 1
            continue
        rows[cell.key] = measure(cell)
        gc.collect()
    order = [cell.key for cell in cells() if cell.key in rows]
    write(options.output, machine_facts(), [rows[key] for key in order])
    print(f"{len(order)} cells measured, {missing} left")


if __name__ == "__main__":
    main()
