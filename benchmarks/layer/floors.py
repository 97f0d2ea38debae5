"""What bounds one layer on this machine: the parts of its work, what they allow, and the time it takes.

    python -m benchmarks.layer.floors [--seconds 4] [--configs A B C D] [--dtypes bf16] [--output FILE.md]

Of each configuration of the benchmark, in one run and in turns: every part alone (`parts`), by the kernels'
own functions, on all threads at once; a plain read and a plain fill; the layer's experts; and the dense
product. Three bounds follow:

- (a) the largest of the unit for products, the vector unit and memory, as if the others hid behind it;
- (b) products with their epilogues, interleaved or one after the other, whichever is faster, and then the
  larger of memory and packing: what is left if products and memory do not overlap. "hidden" is the share of
  a read that does hide behind a product on operands that lie near, in the same run: 0 if the times add up;
- (c) all parts one after the other.

Of decoding it measures a plain read of the touched weights, and a call with experts of 32 x 32: all but the
read.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import tempfile
from pathlib import Path

import torch

from flexpert.bench.implementations import DECODE, FORWARD, OURS, REFERENCES, TRAINING, Implementation
from flexpert.bench.machine import machine_facts
from flexpert.bench.measure import interleave, prepare, summary
from flexpert.bench.problem import DTYPES, SHAPES, Problem, make_problem
from flexpert.ops.memory import prefer_huge_pages

from .parts import (
    ASKING,
    BLOCK,
    BOTH,
    EPILOGUE,
    FAR,
    NEAR,
    ON_MEMORY,
    PRODUCT,
    Part,
    Parts,
    Run,
    compile_parts,
    parts_of,
    runs_on,
)

# Percent of dense that a layer is meant to reach; forward with packed weights where the dtype has them.
TARGETS = {
    "bf16": {FORWARD: {"A": 110, "B": 110, "C": 90}, TRAINING: {"A": 105, "B": 95, "C": 85}},
    "fp32": {FORWARD: {"A": 95, "B": 95, "C": 90}, TRAINING: {"A": 95, "B": 95, "C": 90}},
}
# Percent of the read, by tokens: operator and layer.
DECODE_TARGETS = {1: (95, 85), 8: (95, 92), 64: (85, 82)}
PARTS_HEAD = """\
| part | GFLOP | MB read | MB written | product | rest, near | both | rest, on memory |
|---|---:|---:|---:|---:|---:|---:|---:|"""
BOUNDS_HEAD = """\
| ms | products | vectors | memory | hidden, % | (a) | (b) | (c) | flexpert | dense |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""
PERCENT_HEAD = """\
| % of dense | (a) | (b) | (c) | flexpert | target | |
|---|---:|---:|---:|---:|---:|---|"""
DECODE_HEAD = """\
| decode | MB | read | 32 x 32 | operator | most, % | % | target | 32 x 32 | layer | most, % | % | target |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""
COMPARABLE = 0.3  # the least ratio of two times whose overlap can be told
Times = dict[str, float]  # milliseconds by name


def find(name: str) -> Implementation:
    """An implementation of the benchmark."""
    return next(item for item in (*OURS, *REFERENCES) if item.name == name)


def part_runs(parts: Parts, part: Part) -> dict[str, Run]:
    """How a part is measured, by name."""
    if part.function == "sums":
        return {"far": parts.part("sums", int("backward" not in part.title))}
    if not part.flops:
        return {"near": parts.part(part.function, NEAR), "far": parts.part(part.function, FAR)}
    hows = {"product": PRODUCT, "near": EPILOGUE, "both": BOTH, "far": ON_MEMORY}
    return {name: parts.part(part.function, how) for name, how in hows.items()}


def measure(
    problem: Problem, library: ctypes.CDLL, listed: list[Part], mode: str, packed: bool, seconds: float
) -> Times:
    """Median milliseconds of everything, in turns."""
    parts = Parts(library, problem, trains=mode == TRAINING)
    y_rows = parts.tensors["y_rows"]
    assert y_rows is not None
    runs = {f"{part.title}, {name}": run for part in listed for name, run in part_runs(parts, part).items()}
    runs |= {
        "read of w1": parts.read(problem.w1),
        "read of w2": parts.read(problem.w2),
        "read of rows": parts.read(y_rows),
        "fill of rows": parts.fill(y_rows),
        "asking": parts.part("first_product", ASKING),
    }
    names = ["flexpert", "dense", *["flexpert prepacked"] * packed]
    runs |= {name: prepare(find(name), problem, mode) for name in names}
    return {name: summary(values)["median_ms"] for name, values in interleave(runs, seconds).items()}


def beside(ms: Times, part: Part) -> float:
    """Milliseconds of a product with its epilogue; memory counts that of a weight gradient, a store."""
    alone = ms[f"{part.title}, product"]
    if part.weights:
        return alone
    return min(ms[f"{part.title}, both"], alone + ms[f"{part.title}, near"])


def total(ms: Times, listed: list[Part], *names: str) -> float:
    """Milliseconds of all parts, measured as named."""
    return sum(ms.get(f"{part.title}, {name}", 0.0) for part in listed for name in names)


def memory_ms(ms: Times, listed: list[Part], rows_bytes: int) -> float:
    """Of the bytes that must move.

    Weights at the speed of a plain read, their gradients as epilogues write them, and rows at the speed of
    plain reads and fills of as many as there are results.
    """
    weights = {"w1": ms["read of w1"], "w2": ms["read of w2"]}
    time = 0.0
    for part in listed:
        if part.weights and part.written:
            time += ms[f"{part.title}, far"]
        elif part.weights:
            time += next(value for name, value in weights.items() if name in part.title)
        else:
            moved = part.read * ms["read of rows"] + part.written * ms["fill of rows"]
            time += moved / rows_bytes
    return time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Milliseconds of the three units, and what they allow.

    `hidden` is a share; None where a read and a product are of too different length to tell.
    """

    products: float
    vectors: float
    memory: float
    hidden: float | None
    both: float
    packing: float
    in_turn: float

    @property
    def levels(self) -> tuple[float, float, float]:
        """(a), (b) and (c)."""
        one = max(self.products, self.vectors, self.memory)
        return one, self.both + max(self.memory, self.packing), self.in_turn


def bounds(ms: Times, listed: list[Part], rows_bytes: int, packed: bool) -> Bounds:
    """What the parts add up to; packed weights are read and not packed."""
    weights = ms["read of w1"] + ms["read of w2"] if packed else 0.0
    moves = [part for part in listed if not part.flops]
    alone, read = ms["first product, product"], ms["read of w1"]
    comparable = COMPARABLE * max(alone, read) <= min(alone, read)
    return Bounds(
        products=total(ms, listed, "product"),
        vectors=total(ms, listed, "near"),
        memory=memory_ms(ms, listed, rows_bytes) + weights,
        hidden=(alone + read - ms["asking"]) / min(alone, read) if comparable else None,
        both=sum(beside(ms, part) for part in listed if part.flops),
        packing=total(ms, moves, "near"),
        in_turn=total(ms, listed, "product", "far") + weights,
    )


def part_line(ms: Times, part: Part) -> str:
    """The table row of a part."""
    work = [f"{part.flops / 1e9:.1f}" if part.flops else "-"]
    work += [f"{size / 1e6:.0f}" if size else "-" for size in (part.read, part.written)]
    found = [ms.get(f"{part.title}, {name}") for name in ("product", "near", "both", "far")]
    return f"| {' | '.join([part.title, *work, *('-' if t is None else f'{t:.2f}' for t in found)])} |"


def cell(
    config: str, dtype: str, mode: str, problem: Problem, library: ctypes.CDLL, seconds: float
) -> tuple[list[str], str, str]:
    """(the table of the parts, the row of milliseconds, the row of percents) of one cell."""
    packed = dtype == "bf16" and mode == FORWARD
    listed = parts_of(problem, trains=mode == TRAINING, packed=packed)
    ms = measure(problem, library, listed, mode, packed, seconds)
    rows_bytes = problem.id_TK.numel() * problem.shape.model_dim * problem.dtype.itemsize
    found = bounds(ms, listed, rows_bytes, packed)
    ours = min(ms.get(name, ms["flexpert"]) for name in ("flexpert", "flexpert prepacked"))
    numbers = [f"{time:.1f}" for time in (found.products, found.vectors, found.memory)]
    numbers.append("-" if found.hidden is None else f"{100 * found.hidden:.0f}")
    numbers += [f"{time:.1f}" for time in (*found.levels, ours, ms["dense"])]
    percents = [100 * ms["dense"] / time for time in (*found.levels, ours)]
    target = TARGETS[dtype][mode][config]
    place = "reached" if percents[3] >= target else "below (b)" if target <= percents[1] else "above (b)"
    name = f"{config} {dtype} {mode}{', packed weights' if packed else ''}"
    table = [f"### {name}", "", *PARTS_HEAD.splitlines(), *[part_line(ms, part) for part in listed]]
    shares = " | ".join(f"{percent:.0f}" for percent in (*percents, target))
    return [*table, ""], f"| {name} | {' | '.join(numbers)} |", f"| {name} | {shares} | {place} |"


def layers(configs: list[str], dtypes: list[str], seconds: float) -> list[str]:
    """The tables of forward and training."""
    parts: list[str] = []
    bounds: list[str] = []
    percents: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            library = compile_parts(dtype, Path(folder))
            for config in configs:
                problem = make_problem(SHAPES[config], DTYPES[dtype])
                for mode in (FORWARD, TRAINING):
                    table, milliseconds, percent = cell(config, dtype, mode, problem, library, seconds)
                    parts += table
                    bounds.append(milliseconds)
                    percents.append(percent)
    tables = [*BOUNDS_HEAD.splitlines(), *bounds, "", *PERCENT_HEAD.splitlines(), *percents]
    return ["## Bounds", "", *tables, "", "## Parts", "", "Milliseconds of all threads together.", "", *parts]


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
    for kind, target in zip(("flexpert", "flexpert layer"), DECODE_TARGETS[tokens], strict=True):
        best = min(ms[kind], ms[kind.replace("flexpert", "flexpert prepacked", 1)])
        rest = ms[f"{kind}, 32 x 32"]
        most = ms["stream"] / (ms["stream"] + rest)
        share = 100 * ms["stream"] / best
        entries.append(f" {rest:.3f} | {best:.3f} | {100 * most:.0f} | {share:.0f} | {target} |")
    return f"| T = {tokens} | {problem.touched_bytes / 1e6:.0f} | {ms['stream']:.3f} |{''.join(entries)}"


def main() -> None:
    """Print the tables, and write them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each cell")
    parser.add_argument("--configs", nargs="+", default=[*SHAPES, "D"], choices=[*SHAPES, "D"])
    parser.add_argument("--dtypes", nargs="+", default=[*DTYPES], choices=[*DTYPES])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    missing = [dtype for dtype in options.dtypes if not runs_on(dtype)]
    if missing:
        parser.error(f"--dtypes {' '.join(missing)}: measured by kernels with AVX-512, which do not run here")
    machine = machine_facts()
    text = [
        "# What bounds one layer",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}; milliseconds.",
        "",
    ]
    large = [config for config in options.configs if config in SHAPES]
    if large:
        text += layers(large, options.dtypes, options.seconds)
    if "D" in options.configs:
        rows = [decode(tokens, options.seconds) for tokens in DECODE_TARGETS]
        text += ["## Decoding", "", *DECODE_HEAD.splitlines(), *rows]
    page = "\n".join(text).rstrip()
    print(page)
    if options.output:
        options.output.write_text(page + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
