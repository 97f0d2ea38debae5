"""`flexpert calibrate`: measure the machine that the ranks run on, for the cost model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError
from flexpert.core.files import check_writable

NAME = "calibrate"
HELP = "Measure products, links and overheads of the ranks that run this, in seconds, for the cost model."
EXAMPLES = (
    "flexpert calibrate",
    "torchrun --nproc-per-node 4 -m flexpert calibrate --out machine.json",
    "flexpert emulate --nodes 4 --ranks 2 --bandwidth 200mbit --latency 500us -- flexpert calibrate",
    "flexpert calibrate --dtypes float32 bfloat16 --model-dim 1024 --hidden-dim 4096",
)
ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # where one process meets itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and where the result goes."""
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], metavar="DTYPE", help="of products (float32)"
    )
    parser.add_argument(
        "--model-dim", type=int, default=256, metavar="D", help="of the expert measured (256)"
    )
    parser.add_argument("--hidden-dim", type=int, default=1024, metavar="F", help="of it (1024)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each measurement (5)")
    parser.add_argument("--name", default="", help="of the machine")
    parser.add_argument("--out", type=Path, metavar="FILE", help="in place of the user's cache folder")


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure and store; None on all ranks but the first."""
    import torch.distributed as dist

    from flexpert.parallel.together import Ranks
    from flexpert.train.world import process_group, read_world
    from flexpert.tune.calibrate import calibrate, store

    world = read_world()
    if world.size == 1:
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
    with process_group(world, world.device()):
        if options.out is not None:
            Ranks().first(lambda: _prepare(options.out))
        machine = calibrate(
            dtypes=options.dtypes,
            model_dim=options.model_dim,
            hidden_dim=options.hidden_dim,
            repeats=options.repeats,
            name=options.name,
        )
        if dist.get_rank():
            return None
        return {"file": str(store(machine, options.out)), "machine": machine.to_dict()}


def _prepare(path: Path) -> None:
    """Make the folder of the result and refuse a file that cannot be written, before anything is measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={str(path)!r}: cannot make {path.parent}: {error.strerror}") from error
    check_writable(path)


def describe(result: dict[str, Any]) -> str:
    """The numbers that matter most."""
    machine = result["machine"]
    between, inside = machine["between"], machine["inside"]
    shared = machine["processors"]
    lines = [
        f"{machine['name']}, measured in {machine['facts']['seconds']} s",
        f"  inside nodes   {inside['bandwidth'] / 1e6:.0f} MB/s, {inside['latency'] * 1e6:.0f} us, "
        f"{inside['per_message'] * 1e6:.0f} us a message",
        f"  between nodes  {between['bandwidth'] / 1e6:.0f} MB/s, {between['latency'] * 1e6:.0f} us, "
        f"{between['per_message'] * 1e6:.0f} us a message",
        *(
            f"  {dtype:14s} {max(rate['forward']) / 1e9:.0f} GFLOP/s forward, "
            f"{max(rate['backward']) / 1e9:.0f} backward, at most"
            for dtype, rate in machine["rates"].items()
        ),
        f"  processors     {'one for each rank' if shared is None else f'{shared:.1f} for all ranks'}",
        f"  overlap        {machine['overlap']:.0%} of what could hide does",
        f"written: {result['file']}",
    ]
    return "\n".join(lines)
