"""Training step of one layer against its peers: `python -m benchmarks.layer`.

Writes results/<stem>.json and results/<stem>.md beside this file. "Percent of dense" is the time of two
plain products with the same useful FLOPs, measured in the same turns, over the contender's time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .contenders import CONTENDERS
from .measure import Run, interleave, machine_facts, make_run, peak_mib, summary
from .problem import SHAPES, make_problem
from .report import markdown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure_memory(shape: str, dtype: str, names: list[str]) -> dict[str, float]:
    """Peak MiB of one training step of each contender."""

    def maker(name: str) -> Run:
        torch.set_num_threads(1)  # a fork of a process with idle worker threads would wait for them
        problem = make_problem(SHAPES[shape], DTYPES[dtype])
        step = CONTENDERS[name](problem)
        return (lambda: None) if step is None else make_run(name, step, problem, backward=True)

    return {name: peak_mib(lambda name=name: maker(name)) for name in names}


def measure_times(shape: str, dtype: str, names: list[str], seconds: float) -> list[dict[str, object]]:
    """One row per contender and direction."""
    problem = make_problem(SHAPES[shape], DTYPES[dtype])
    steps = {name: step for name in names if (step := CONTENDERS[name](problem)) is not None}
    rows: list[dict[str, object]] = []
    for direction, share in (("forward", 0.3), ("forward+backward", 0.7)):
        backward = direction != "forward"
        runs = {name: make_run(name, step, problem, backward) for name, step in steps.items()}
        times = {name: summary(values) for name, values in interleave(runs, seconds * share).items()}
        for name, row in times.items():
            percent = {
                f"percent_of_dense{end}": round(100 * times["dense"][key] / row[key], 1)
                for end, key in (("", "median_ms"), ("_by_minima", "min_ms"))
            }
            rows.append(
                {"shape": shape, "dtype": dtype, "direction": direction, "contender": name, **row, **percent}
            )
    return rows


def main() -> None:
    """Measure memory first (its children are forked before any thread starts), then time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=20, help="timing budget of one shape and dtype")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory of each contender")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "layer")
    options = parser.parse_args()
    names = list(dict.fromkeys(["dense", *options.contenders]))
    cells = [(shape, dtype) for shape in options.shapes for dtype in options.dtypes]
    memory = {} if options.no_memory else {cell: measure_memory(*cell, names) for cell in cells}
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        for row in measure_times(*cell, names, options.seconds):
            row["peak_mib"] = memory.get(cell, {}).get(str(row["contender"]))
            rows.append(row)
            print(json.dumps(row), flush=True)
        result = {"machine": machine_facts(), "shapes": {k: vars(v) for k, v in SHAPES.items()}, "rows": rows}
        options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
