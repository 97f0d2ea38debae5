"""`flexpert bench`: the speed and memory of one layer beside its peers."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

NAME = "bench"
HELP = "Measure one MoE layer beside a dense product, a streaming read and other implementations."
EXAMPLES = (
    "flexpert bench --quick",
    "flexpert bench --output benchmarks/layer/results/layer",
    "flexpert bench --configs A D --dtypes bf16 --seconds 5",
    "flexpert bench --tokens 512 --model-dim 256 --hidden-dim 1024 --experts 16 --top-k 2 --expert glu",
    "flexpert bench --configs B --implementations flexpert 'sort + loop' --no-memory --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, how long, and a configuration of one's own."""
    parser.add_argument(
        "--quick", action="store_true", help="a minute: one dtype, fewer peers and repetitions"
    )
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="of A, B, C (training) and D (decode)")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="of fp32 and bf16; D is always bf16")
    parser.add_argument(
        "--implementations", nargs="+", metavar="NAME", help="beside dense and stream; a wrong name lists all"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="timing budget of one table (20; quick: 4)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch (all cores)")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory of a training step")
    parser.add_argument("--output", type=Path, metavar="STEM", help="write STEM.json, STEM.md and STEM.png")
    custom = parser.add_argument_group(
        "a configuration of your own, in place of A to D (default: as A, dropless)"
    )
    for flag in ("--tokens", "--model-dim", "--hidden-dim", "--experts", "--top-k"):
        custom.add_argument(flag, type=int, metavar="N")
    custom.add_argument("--expert", choices=("mlp", "glu"))
    custom.add_argument("--dtype", choices=("fp32", "bf16"))
    custom.add_argument("--capacity-factor", type=float, metavar="X")
    custom.add_argument("--activation", metavar="NAME")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; machine, configurations and rows."""
    from flexpert.bench import check_output, make_plan, run_benchmark, write
    from flexpert.bench.plan import CUSTOM_FLAGS

    plan = make_plan(
        quick=options.quick,
        configs=options.configs,
        dtypes=options.dtypes,
        custom={flag: getattr(options, flag) for flag in CUSTOM_FLAGS},
        implementations=options.implementations,
        seconds=options.seconds,
        threads=options.threads,
        memory=not options.no_memory,
    )
    if options.output is not None:
        check_output(options.output)
    # Standard output is the result's; other packages greet there when they are imported.
    with contextlib.redirect_stdout(sys.stderr):
        result = run_benchmark(plan)
        if options.output is not None:
            result["files"] = [str(path) for path in write(result, options.output)]
    return result


def describe(result: dict[str, Any]) -> str:
    """The tables."""
    from flexpert.bench.report import sections

    lines = sections(result)
    if "files" in result:
        lines += ["", "written: " + ", ".join(result["files"])]
    return "\n".join(lines)
