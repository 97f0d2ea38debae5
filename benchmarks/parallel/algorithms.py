"""Linear against hierarchical all-to-all over sizes.

python -m benchmarks.parallel.algorithms [--nodes 4] [--ranks 4]
"""

from __future__ import annotations

import argparse

import torch

from flexpert.emulate import Cluster
from flexpert.parallel import expert_mesh

from .timing import interleaved, record

KIB = (1, 4, 16, 64, 256, 1024, 4096)
LARGE = 1024  # from here on the link decides, and a third of the repetitions is enough
WIDTH = 16


def on_rank(local: int, repeats: int) -> list[dict[str, object]]:
    """Both algorithms for each size, in turns; equal results are checked."""
    world = torch.distributed.get_world_size()
    mesh = expert_mesh(world, ranks_per_node=local)
    rows: list[dict[str, object]] = []
    for kib in KIB:
        each = max(1, kib * 1024 // (4 * WIDTH * world))
        x = torch.randn(each * world, WIDTH)
        # Known once, as a layer keeps them.
        even, results = torch.full((world, world, 1), each), {}
        splits = {name: algorithm.known(even) for name, algorithm in mesh.algorithms.items()}

        def call(name: str, x=x, splits=splits, results=results) -> None:
            results[name] = mesh.algorithms[name].start(x, splits[name]).wait()

        calls = {n: (lambda n=n: call(n)) for n in ("linear", "2dh")}
        warmup = 8 if kib == KIB[0] else 2  # a forked rank's first calls copy the pages that it writes to
        times = repeats if kib < LARGE else -(-repeats // 3)
        for name, figures in interleaved(calls, times, warmup, apart=True).items():
            rows.append({"kib": kib, "bytes": x.nbytes, "algorithm": name, **figures})
        assert torch.equal(results["linear"], results["2dh"])
    return rows


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--bandwidth", default="200mbit")
    parser.add_argument("--latency", default="500us")
    parser.add_argument("--repeats", type=int, default=21, help="of messages below 1 MiB")
    options = parser.parse_args()
    shape = {"nodes": options.nodes, "ranks": options.ranks}
    with Cluster(**shape, bandwidth=options.bandwidth, latency=options.latency) as cluster:
        rows = cluster.run(on_rank, options.ranks, options.repeats, timeout=1200)[0]
        mode = cluster.mode
    table = []
    for kib in KIB:
        a, b = (row["median_ms"] for row in rows if row["kib"] == kib)
        table.append([str(kib), f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}"])
    words = (
        f"{options.nodes} nodes of {options.ranks} ranks, {options.bandwidth} and {options.latency} one way "
        f"({mode}): median milliseconds of {options.repeats} calls, from 1 MiB on a third; the "
        f"slowest rank counts. What makes small messages slow here is the processor's time per message in "
        f"gloo (all ranks share two cores), not the wire; the gain of 2DH on small ones is that of fewer "
        f"messages, and no statement about a network."
    )
    header = ["KiB per rank", "linear ms", "2DH ms", "linear / 2DH"]
    record(f"algorithms_{options.nodes}x{options.ranks}", words, header, table, rows)


if __name__ == "__main__":
    main()
