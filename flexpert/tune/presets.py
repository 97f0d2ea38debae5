"""Machines of public clusters: numbers that others measured, each with its source; nothing was measured here.

No number is fitted to what `flexpert simulate --paper` compares with.

A100 on Azure (ND96amsr_A100_v4, the paper's machine): means of 729 nodes as published for SuperBench 0.4
(github.com/microsoft/superbench-results, v0.4.0/Azure-NDmv4-A100/baseline.json): products of 127.4 (TF32),
261.2 (bf16) and 275.4 (fp16) TFLOP/s, copies of 1,371 GB/s, an all-reduce of 8 GiB in a node with a bus
bandwidth of 235.7 GB/s, 23.94 GB/s of InfiniBand for each of eight devices, 5.5 us for a kernel launch.
Latencies are those by which NCCL 2.10, the paper's version, predicts its own rings (src/graph/tuning.cc,
"Simple" protocol): 3.4 us over NVLink, 9.6 us over the network, 8.4 us for any collective. A message costs a
rank one such latency, since NCCL serves its peers one after the other.
Overlap: NCCL occupies 16 of the 108 multiprocessors, by which products take longer meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexpert.core.errors import ConfigError
from flexpert.core.registry import suggest

from .machine import Link, Machine, Overheads, Rate

ROWS = (1, 16, 64, 256, 1024, 4096, 16_384, 65_536)
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class _Public:
    """What is published of a machine; bytes and operations per second, seconds."""

    flops: Mapping[str, float]
    copies: float
    inside: float
    between: float
    memory: int
    multiprocessors: int
    facts: Mapping[str, str]


_DATA = {
    "a100-ndv4": _Public(
        flops={"float32": 127.4e12, "bfloat16": 261.2e12, "float16": 275.4e12},
        copies=1371e9,
        inside=235.7e9,
        between=8 * 23.94e9,
        memory=80 * 2**30,
        multiprocessors=108,
        facts={
            "rates, copies, links, launches": "SuperBench 0.4, Azure NDmv4 A100, 729 nodes",
            "latencies": "NCCL 2.10, src/graph/tuning.cc",
            "float32": "TF32",
        },
    ),
    "h100-sxm": _Public(
        # Specified, times the shares of its specification that the A100 above reaches.
        flops={"float32": 495e12 * 0.82, "bfloat16": 989e12 * 0.84, "float16": 989e12 * 0.88},
        copies=3350e9 * 0.67,
        inside=450e9 * 0.79,
        between=8 * 50e9 * 0.96,
        memory=80 * 2**30,
        multiprocessors=132,
        facts={
            "rates, copies, links": "as specified, times what an A100 reaches of its own",
            "latencies": "NCCL 2.10, src/graph/tuning.cc",
            "float32": "TF32",
        },
    ),
}

DEVICES = dict.fromkeys(_DATA, 8)  # of a node


def preset(name: str) -> Machine:
    """A machine by name: "a100-ndv4" (8 GPUs a node, NVLink 3, 8 x 200 Gb/s) or "h100-sxm".

    Raises:
        ConfigError: an unknown name; the message lists the known ones.
    """
    if name not in _DATA:
        raise ConfigError(f"machine: unknown preset {name!r}: {suggest(name, _DATA)}")
    data = _DATA[name]
    launch = 5.5e-6
    return Machine(
        name=name,
        inside=Link(latency=3.4e-6, bandwidth=data.inside, per_message=3.4e-6, step=3.4e-6),
        between=Link(latency=9.6e-6, bandwidth=data.between, per_message=9.6e-6, step=9.6e-6),
        rates={dtype: roofline(peak, SIZES[dtype], data.copies) for dtype, peak in data.flops.items()},
        memory_bandwidth=data.copies,
        overheads=Overheads(
            call=20 * launch,  # kernels of a layer's forward pass that are no product
            call_backward=40 * launch,
            token=10 * 4 * 32 / data.copies,  # ten passes over a row of scores of 32 experts
            row=4 / data.copies,  # a byte is read and written, there and back
            row_backward=4 / data.copies,
            chunk=2 * launch,
            chunk_backward=2 * launch,
            collective=8.4e-6,
        ),
        overlap=1 - 16 / (data.multiprocessors - 16),
        memory=data.memory,
        facts={"source": "public data, not measured here", **data.facts, "gpus_per_node": DEVICES[name]},
    )


def roofline(peak: float, itemsize: int, reads: float) -> Rate:
    """A product of n rows reads its matrix once: its time is that of the operations and of the reading.

    Args:
        peak: operations per second of large products.
        itemsize: bytes of an element.
        reads: bytes per second.
    """
    rates = tuple(1 / (1 / peak + itemsize / (2 * rows * reads)) for rows in ROWS)
    return Rate(rows=ROWS, forward=rates, backward=rates)
