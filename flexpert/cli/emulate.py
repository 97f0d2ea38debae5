"""`flexpert emulate`: a command on a cluster emulated on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError

NAME = "emulate"
HELP = "Run a command once per rank of a cluster emulated on this machine: nodes, links, faults."
EXAMPLES = (
    "flexpert emulate --nodes 4 --ranks 2 --bandwidth 200mbit --latency 500us -- python train.py",
    "flexpert emulate --nodes 4 --slow-node 2=50mbit --bandwidth 1gbit --only-rank 0 -- python -m my.module",
    "flexpert emulate --nodes 3 --latency 1ms --at 5s 'cut 2' --at 8s 'heal 2' -- python train.py",
    "flexpert emulate --nodes 2 --control links.fifo -- python train.py   # echo 'cut 1' > links.fifo",
    "flexpert emulate --nodes 2 -- sh -c 'echo rank $RANK of $WORLD_SIZE'",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The cluster, how ranks start, faults, output, and the command."""
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="number of nodes (2)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks of each node (1)")
    parser.add_argument(
        "--bandwidth", metavar="RATE", help="of each node's link and direction: 200mbit (no limit)"
    )
    parser.add_argument("--latency", metavar="TIME", help="one way between two nodes: 500us (none)")
    parser.add_argument(
        "--slow-node",
        action="append",
        default=[],
        metavar="NODE=RATE[,TIME]",
        help="a node with another link",
    )
    parser.add_argument(
        "--mode",
        default="auto",
        choices=("auto", "switch", "shape", "bandwidth", "loopback"),
        help="how links are made; auto: the cheapest way that does what is asked",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--fork", action="store_true", default=None, help="import torch once and fork ranks (Python programs)"
    )
    start.add_argument(
        "--no-fork", dest="fork", action="store_false", help="execute the command in each rank"
    )
    parser.add_argument(
        "--preload", nargs="+", default=[], metavar="MODULE", help="import before ranks are forked"
    )
    parser.add_argument(
        "--at", nargs=2, action="append", default=[], metavar=("TIME", "ACTION"),
        help="cut, heal, rate, latency of a node or kill, stop, resume of a rank, that long after the start",
    )  # fmt: skip
    parser.add_argument("--control", type=Path, metavar="FIFO", help="make a FIFO and obey actions from it")
    parser.add_argument("--only-rank", type=int, metavar="RANK", help="show the output of one rank alone")
    parser.add_argument("--timeout", metavar="TIME", help="end ranks that run longer: 90s")
    parser.add_argument(
        "--grace", default="10s", metavar="TIME", help="what others have after one failed (10s)"
    )
    parser.add_argument("--keep-going", action="store_true", help="leave others alone after one failed")
    parser.add_argument("command_words", nargs="+", metavar="COMMAND", help="after --")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the command on the cluster; how each rank ended, and the exit status."""
    from flexpert.emulate import Cluster
    from flexpert.emulate.session import Session
    from flexpert.emulate.units import parse_time

    cluster = Cluster(
        options.nodes,
        options.ranks,
        bandwidth=options.bandwidth,
        latency=options.latency,
        slow_nodes=dict(_slow_node(text) for text in options.slow_node),
        mode=options.mode,
    )
    session = Session(
        command=options.command_words,
        fork=options.fork,
        preload=options.preload,
        only_rank=options.only_rank,
        timeout=None if options.timeout is None else parse_time(options.timeout, "timeout") / 1e9,
        grace=parse_time(options.grace, "grace") / 1e9,
        keep_going=options.keep_going,
        at=[(parse_time(time, "at"), action) for time, action in options.at],
        control=options.control,
        output=sys.stderr if options.json else None,
    )
    return session.run(cluster)


def describe(result: dict[str, Any]) -> str:
    """Which ranks failed, or that none did."""
    count = result["nodes"] * result["ranks"]
    return result["failures"] or f"{count} ranks ended well in {result['seconds']:.1f} s"


def _slow_node(text: str) -> tuple[int, str]:
    node, _, link = text.partition("=")
    if not node.isdecimal() or not link:
        raise ConfigError(f"slow_node={text!r}: expected NODE=RATE or NODE=RATE,TIME, such as 2=50mbit")
    return int(node), link
