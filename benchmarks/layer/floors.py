"""What bounds one layer on this machine: its products, the bytes that must move, and the time it takes.

    python -m benchmarks.layer.floors [--seconds 3] [--configs A B C D] [--dtypes bf16] [--output FILE.md]

Of each configuration of the benchmark, in one run and in turns:

- products: the kernels' own products on operands that lie in the caches, with the rows that an expert has;
- memory: the bytes that must be read and written (weights once per pass, tokens, what is saved for backward,
  gradients), at the speed of a plain read and of a plain fill of as many bytes as the weights have;
- floor: the larger of products and memory, as if they hid each other; and their sum, as if they did not;
- of decode: a plain read of the touched weights, and a call with experts of 32 x 32: all but the read.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flexpert.bench.implementations import DECODE, FORWARD, OURS, REFERENCES, TRAINING, Implementation, stream
from flexpert.bench.machine import machine_facts
from flexpert.bench.measure import interleave, make_run, prepare, summary
from flexpert.bench.problem import DTYPES, SHAPES, Problem, make_problem
from flexpert.ops.cpu import build
from flexpert.ops.memory import empty, prefer_huge_pages

BLOCK = 32
HEADERS = {"fp32": ("f32", "block_f32.h"), "bf16": ("bf16", "block_bf16.h")}
DECODED = (1, 8, 64)
Rate = Callable[[int, int, int], float]


def compile_rate(dtype: str, folder: Path) -> Rate:
    """Seconds of the product of (rows, k) and (k, columns) on each thread, operands in the caches."""
    unit, header = HEADERS[dtype]
    source, library = Path(__file__).with_name("rate.cpp"), folder / f"rate_{dtype}.so"
    compiler, made = build.find_compiler(), str(folder / f"rate_{dtype}.o")
    flags = [*build.FLAGS, *build.UNITS[unit], "-I", str(build.SOURCES), f'-DELEMENT_HEADER="{header}"']
    subprocess.run([*compiler, *flags, "-c", str(source), "-o", made], check=True)
    # Without OpenMP's library: its symbols bind to the runtime of PyTorch.
    subprocess.run([*compiler, "-shared", made, "-o", str(library)], check=True)
    seconds = ctypes.CDLL(str(library)).seconds
    seconds.argtypes, seconds.restype = [ctypes.c_int64] * 6, ctypes.c_double
    amx = build.native().instructions(DTYPES[dtype]) == "AMX"

    def rate(rows: int, size: int, columns: int) -> float:
        depth, wide = -(-size // BLOCK), -(-columns // BLOCK)
        few = min(wide, max(2, 128 // depth))  # a panel that stays in the second-level cache
        return seconds(rows, size, few, torch.get_num_threads(), amx, 40) * wide / few

    return rate


def product_ms(problem: Problem, rate: Rate, trains: bool) -> float:
    """All products of a pass, with the mean number of rows of an expert."""
    shape = problem.shape
    rows, inner = round(problem.rows / shape.num_experts), shape.hidden_dim * (2 if shape.gated else 1)
    products = [(rows, shape.model_dim, inner), (rows, shape.hidden_dim, shape.model_dim)]
    if trains:
        products += [
            (rows, shape.model_dim, shape.hidden_dim),
            (rows, inner, shape.model_dim),
            (inner, rows, shape.model_dim),
            (shape.model_dim, rows, shape.hidden_dim),
        ]
    seconds = sum(rate(*product) for product in products)
    return 1e3 * seconds * shape.num_experts / torch.get_num_threads()


def traffic(problem: Problem, trains: bool) -> tuple[int, int]:
    """Bytes that must be read and written; rows of experts are not counted, they may stay in a cache."""
    shape, item = problem.shape, problem.dtype.itemsize
    weights, tokens = problem.touched_bytes, problem.x_TD.numel() * item
    saved = problem.rows * shape.hidden_dim * (2 if shape.gated else 1) * item
    if trains:
        return 2 * weights + saved + 3 * tokens, weights + saved + 2 * tokens
    return weights + tokens, tokens


def find(name: str) -> Implementation:
    """An implementation of the benchmark."""
    return next(item for item in (*OURS, *REFERENCES) if item.name == name)


def memory_runs(problem: Problem) -> dict[str, Callable[[], float]]:
    """A plain read and a plain fill of as many bytes as the weights have."""
    target = empty(torch.empty(0), (problem.touched_bytes // 4,))

    def fill() -> Tensor:
        return target.zero_()

    steps = {"read": stream(problem), "fill": fill}
    runs = {name: make_run(find("stream"), step, problem, FORWARD) for name, step in steps.items()}
    for run in runs.values():
        run()
    return runs


def cell(config: str, dtype: str, seconds: float, rate: Rate) -> list[str]:
    """Table rows of one configuration: forward, and with backward."""
    problem = make_problem(SHAPES[config], DTYPES[dtype])
    for weight in (problem.w1, problem.w2):
        prefer_huge_pages(weight)
    lines = []
    for mode in (FORWARD, TRAINING):
        trains = mode == TRAINING
        names = ["flexpert", "dense"] + ["flexpert prepacked"] * (dtype == "bf16" and not trains)
        runs = {name: prepare(find(name), problem, mode) for name in names} | memory_runs(problem)

        def products(trains: bool = trains) -> float:
            return product_ms(problem, rate, trains) / 1e3

        times = interleave({**runs, "products": products}, seconds)
        ms = {name: summary(values)["median_ms"] for name, values in times.items()}
        read, written = traffic(problem, trains)
        moved = (read * ms["read"] + written * ms["fill"]) / problem.touched_bytes
        low, high = max(ms["products"], moved), ms["products"] + moved
        ours = min(ms.get(name, ms["flexpert"]) for name in ("flexpert", "flexpert prepacked"))
        lines.append(
            f"| {config} {dtype} {mode} | {ms['products']:.1f} | {read / 1e6:.0f} + {written / 1e6:.0f} |"
            f" {moved:.1f} | {low:.1f} | {high:.1f} | {ours:.1f} | {ms['dense']:.1f} |"
            f" {100 * ms['dense'] / high:.0f} to {100 * ms['dense'] / low:.0f} |"
            f" {100 * ms['dense'] / ours:.0f} |"
        )
    return lines


def decode(tokens: int, seconds: float) -> str:
    """The table row of one number of tokens."""
    shape = dataclasses.replace(SHAPES["B"], tokens=tokens)
    problem = make_problem(shape, torch.bfloat16)
    small = dataclasses.replace(shape, model_dim=BLOCK, hidden_dim=BLOCK)
    tiny = make_problem(small, torch.bfloat16)
    tiny = dataclasses.replace(tiny, id_TK=problem.id_TK, weight_TK=problem.weight_TK)
    for weight in (problem.w1, problem.w2):
        prefer_huge_pages(weight)
    names = ("flexpert", "flexpert prepacked", "flexpert layer", "flexpert prepacked layer", "stream")
    runs = {name: prepare(find(name), problem, DECODE) for name in names}
    runs |= {f"{name}, 32 x 32": prepare(find(name), tiny, DECODE) for name in names[:4:2]}
    times = interleave(runs, seconds)
    ms = {name: summary(values)["median_ms"] for name, values in times.items()}
    entries = []
    for kind in ("flexpert", "flexpert layer"):
        best = min(ms[kind], ms[kind.replace("flexpert", "flexpert prepacked", 1)])
        rest = ms[f"{kind}, 32 x 32"]
        most = ms["stream"] / (ms["stream"] + rest)
        entries.append(f" {rest:.3f} | {best:.3f} | {100 * most:.0f} | {100 * ms['stream'] / best:.0f} |")
    return (
        f"| D bf16, T = {tokens} | {problem.touched_bytes / 1e6:.0f} | {ms['stream']:.3f} |{''.join(entries)}"
    )


def main() -> None:
    """Print the tables, and write them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row of a table")
    parser.add_argument("--configs", nargs="+", default=[*SHAPES, "D"], choices=[*SHAPES, "D"])
    parser.add_argument("--dtypes", nargs="+", default=[*DTYPES], choices=[*DTYPES])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    machine = machine_facts()
    text = [
        "# What bounds one layer",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}; ms.",
    ]
    large = [config for config in options.configs if config in SHAPES]
    if large:
        text += [
            "",
            "| | products | MB moved | memory | larger | sum | flexpert | dense | floors, % | flexpert, % |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
    with tempfile.TemporaryDirectory() as folder:
        for dtype in options.dtypes if large else ():
            rate = compile_rate(dtype, Path(folder))
            for config in large:
                text += cell(config, dtype, options.seconds, rate)
    if "D" in options.configs:
        text += [
            "",
            "| | MB | read | 32 x 32 | operator | most, % | % | 32 x 32 | layer | most, % | % |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
            *[decode(tokens, options.seconds) for tokens in DECODED],
        ]
    print("\n".join(text))
    if options.output:
        options.output.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
