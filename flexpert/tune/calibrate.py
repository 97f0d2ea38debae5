"""Measuring the machine that the ranks run on: a `Machine`, in seconds.

Letters: W ranks, N nodes, L ranks of each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flexpert.core.errors import ConfigError
from flexpert.core.files import check_writable
from flexpert.ops.cpu.build import cache_folder
from flexpert.parallel.mesh import ExpertMesh, expert_mesh

from . import probes
from .fit import fitted
from .links import Links
from .machine import Link, Machine, Overheads, Rate
from .placed import observe
from .probes import Stopwatch
from .workload import DTYPES

ROWS = (1, 8, 32, 128, 512, 2048)


def calibrate(
    *,
    dtypes: Sequence[str] = ("float32",),
    model_dim: int = 256,
    hidden_dim: int = 1024,
    ranks_per_node: int | None = None,
    repeats: int = 5,
    name: str = "",
) -> Machine:
    """Measure the ranks of the default process group; all of them call it.

    Args:
        dtypes: whose products are measured.
        model_dim, hidden_dim: of the expert that is measured.
        ranks_per_node: neighbours that share a node; None as in `expert_mesh`.
        repeats: of each measurement; the median counts.
        name: of the machine; "" for its processor and links.

    Returns:
        the machine, equal on all ranks.

    Raises:
        ConfigError: an unknown dtype, a number below 1, or nodes with unequal numbers of ranks.
        DistributedError: no process group is initialised, or a rank is gone.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ConfigError(f"dtypes: {dtype!r}, expected some of {', '.join(DTYPES)}")
    for key, value in (("model_dim", model_dim), ("hidden_dim", hidden_dim), ("repeats", repeats)):
        if value < 1:
            raise ConfigError(f"{key}={value}: expected an integer >= 1")
    began = time.perf_counter()
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = expert_mesh(world, ranks_per_node=ranks_per_node, heartbeat=0)
    watch = Stopwatch(mesh, repeats)
    found = {dtype: _rate(watch, DTYPES[dtype], model_dim, hidden_dim) for dtype in dtypes}
    processors = _processors(statistics.median(slower for _, slower in found.values()), world)
    contention = max(1.0, world / processors) if processors else 1.0
    bandwidth = 2 * 2**24 / watch.alone([probes.copy(2**24)])[0]
    overheads = _overheads(watch, model_dim, DTYPES[dtypes[0]])
    links = Links(mesh, watch, contention).measure() if world > 1 else _one_rank(bandwidth)
    machine = Machine(
        name=name,
        inside=links["inside"],
        between=links["between"],
        rates={dtype: rate for dtype, (rate, _) in found.items()},
        memory_bandwidth=bandwidth,
        overheads=Overheads(**overheads, collective=links["collective"], relay=links["collective"]),
        processors=processors,
        sharing=world,
        overlap=0.5 if world > 1 else 1.0,
        reduce_scatter=links["reduce_scatter"],
        memory=_memory(world),
    )
    if world > 1:
        observations = observe(mesh, watch, DTYPES[dtypes[0]], model_dim, hidden_dim)
        if mesh.everyone.rank == 0:  # alone on the processors
            machine = fitted(machine, observations)
    facts = _facts(mesh) | {"seconds": round(time.perf_counter() - began, 1)}
    return _agreed(mesh, dataclasses.replace(machine, name=name or _name(facts), facts=facts))


def _rate(watch: Stopwatch, dtype: torch.dtype, model_dim: int, hidden_dim: int) -> tuple[Rate, float]:
    """(rates of one rank alone, how many times as long they take where all ranks compute at once)."""
    pairs = probes.products(dtype, model_dim, hidden_dim, ROWS)
    calls = [pair[side] for side in range(2) for pair in pairs]
    times, together = watch.alone(calls, 3), watch.together(calls, 3)
    slower = sum(together) / sum(times)
    flops, number = 4 * model_dim * hidden_dim, len(ROWS)
    forward, backward = times[:number], times[number:]
    # A rank may be interrupted: more rows never take less time.
    for side in (forward, backward):
        for i in reversed(range(number - 1)):
            side[i] = min(side[i], side[i + 1])
    rate = Rate(
        rows=ROWS,
        forward=tuple(n * flops / t for n, t in zip(ROWS, forward, strict=True)),
        backward=tuple(2 * n * flops / t for n, t in zip(ROWS, backward, strict=True)),
    )
    return rate, slower


def _processors(slower: float, world: int) -> float | None:
    """How many ranks can compute at once as fast as one alone; None: all of them.

    Emulated nodes are one machine, which cannot have more than its cores.
    """
    if world == 1:
        return None  # shares with nobody, whatever else the machine did between the two measurements
    most = os.cpu_count() if "FLEXPERT_EMULATE" in os.environ else None
    found = min(world / max(slower, 1e-9), most or world)
    return None if found > 0.9 * world else max(1.0, found)


def _overheads(watch: Stopwatch, model_dim: int, dtype: torch.dtype) -> dict[str, float]:
    """Of one rank alone: a layer with next to no products, tiny and large, whole and in chunks."""
    few, many = 16, 2048
    tiny = probes.OneRankLayer(few, model_dim, 8, 4, dtype)
    large = probes.OneRankLayer(many, model_dim, 8, 4, dtype)
    small, small_back, cut, cut_back, big, big_back, *routes = watch.alone(
        [
            tiny.forward,
            tiny.backward,
            lambda: tiny.forward(8),
            tiny.backward,
            large.forward,
            large.backward,
            tiny.route,
            tiny.route_backward,
            large.route,
            large.route_backward,
        ]
    )
    size = model_dim * dtype.itemsize
    token, token_back = ((routes[i + 2] - routes[i]) / (many - few) for i in range(2))
    row, row_back = (
        ((b - s) / (many - few) - t) / size
        for b, s, t in ((big, small, token), (big_back, small_back, token_back))
    )
    found = {
        "call": small,
        "call_backward": small_back,
        "chunk": (cut - small) / 7,
        "chunk_backward": (cut_back - small_back) / 7,
        "token": token,
        "token_backward": token_back,
        "row": row,
        "row_backward": row_back,
    }
    return {key: max(0.0, value) for key, value in found.items()}


def _one_rank(bandwidth: float) -> dict[str, Any]:
    """Of a world of one, which sends nothing."""
    link = Link(latency=0.0, bandwidth=bandwidth)
    return {
        "inside": link,
        "between": link,
        "collective": 0.0,
        "reduce_scatter": 1.0,
    }


def _name(facts: dict[str, Any]) -> str:
    return f"{facts['cpu']}, {facts['nodes']} x {facts['ranks_per_node']} ranks"


def _facts(mesh: ExpertMesh) -> dict[str, Any]:
    from flexpert.ops.cpu.processor import processor

    return {
        "cpu": processor()[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": dist.get_backend(),
        "nodes": len(set(mesh.everyone.node_of)),
        "ranks_per_node": mesh.ranks_per_node,
        "emulated": os.environ.get("FLEXPERT_EMULATE", ""),
    }


def _memory(world: int) -> int:
    """Bytes of the machine for one of its ranks; 0 where the system does not tell."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world


def _agreed(mesh: ExpertMesh, machine: Machine) -> Machine:
    """Rank 0's: facts such as seconds differ a little."""
    text = machine.to_json().encode()
    size = torch.tensor([len(text)])
    mesh.everyone.all_reduce(size, "max")
    buffer = torch.zeros(int(size), dtype=torch.uint8)
    if mesh.everyone.rank == 0:
        buffer[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    mesh.everyone.all_reduce(buffer, "max")
    return Machine.from_json(bytes(buffer.tolist()).rstrip(b"\0").decode())


def machine_file(facts: dict[str, Any]) -> Path:
    """Where the machine of these facts is kept, in the user's cache folder."""
    told = {key: value for key, value in sorted(facts.items()) if key != "seconds"}
    return cache_folder() / "machines" / f"{zlib.crc32(json.dumps(told).encode()):08x}.json"


def store(machine: Machine, path: Path | None = None) -> Path:
    """Write a machine to a file, whole or not at all; None: where `machine_file` says.

    Raises:
        ConfigError: it cannot be written.
    """
    path = machine_file(dict(machine.facts)) if path is None else path
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
        partial.write_text(machine.to_json(), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; name another file") from error
    return path


def stored(mesh: ExpertMesh) -> Machine | None:
    """The machine that was stored for such ranks; None where there is none.

    A damaged file is none: measuring anew is cheap.
    """
    try:
        return Machine.from_json(machine_file(_facts(mesh)).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ConfigError is one, and so is a text that is no UTF-8
        return None
