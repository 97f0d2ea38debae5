"""Machines from public data, not measured here: GPU clusters of the A100 and H100 class.

Sources:
- peak rates, memory, NVLink: NVIDIA's data sheets of A100 80GB SXM (312 TFLOP/s bf16, 156 TF32, 2,039 GB/s,
  600 GB/s of NVLink both ways together) and of H100 SXM (989, 495, 3,350 GB/s, 900 GB/s);
- network: one 200 Gb/s HDR adapter per GPU (Azure's documentation of ND A100 v4), one 400 Gb/s NDR adapter
  per GPU (DGX H100);
- latencies of rings and collectives: the tables in NCCL's `src/graph/tuning.cc` (simple protocol: 3.4 us a
  step over NVLink, 9.6 us over the network, 8.4 us a collective; rings on A100 reach at most 235 GB/s).

Assumptions, where no public measurement was found: links and products reach `REACHED` of their peak; a
message to another node costs a rank 1.5 us and one inside the node 0.5 us; a layer's calls cost tens of
kernel launches. Rates follow the roofline (Williams et al., 2009): the time of a row is that of its
operations at the rate that is reached, and beside it the time to read the weights, which all rows of an
expert share. They are meant for ratios between plans and scales; calibrate on a machine to predict its times.
"""

from __future__ import annotations

from flexpert.core.errors import ConfigError
from flexpert.core.registry import suggest

from .machine import Link, Machine, Overheads, Rate

REACHED = 0.75
LAUNCH = 8e-6  # seconds of a kernel launch from PyTorch
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)


def _rate(peak: float, memory: float, itemsize: int) -> Rate:
    """Of products whose weights are read from memory once: 2 operations a row for each element of them."""
    reached = REACHED * peak
    weights = itemsize / memory / 2  # seconds of reading, for each operation of one row
    forward = tuple(n / (n / reached + weights) for n in ROWS)
    # Backward reads the weights and writes their gradients, for twice the operations.
    backward = tuple(2 * n / (2 * n / reached + 2 * weights) for n in ROWS)
    return Rate(rows=ROWS, forward=forward, backward=backward)


def _cluster(
    name: str, bf16: float, tf32: float, memory: float, nvlink: float, network: float, ring: float
) -> Machine:
    """Nodes of 8 GPUs; rates in operations and bytes per second, links one way of one GPU."""
    half, single = _rate(bf16, memory, 2), _rate(tf32, memory, 4)
    return Machine(
        name=name,
        inside=Link(
            latency=3.4e-6,
            bandwidth=REACHED * nvlink,
            per_message=0.5e-6,
            step=3.4e-6,
            ring_bandwidth=ring,
        ),
        between=Link(
            latency=9.6e-6,
            bandwidth=REACHED * 8 * network,
            per_message=1.5e-6,
            step=9.6e-6,
            ring_bandwidth=REACHED * 8 * network,
        ),
        rates={"bfloat16": half, "float16": half, "float32": single},
        memory_bandwidth=REACHED * memory,
        overheads=Overheads(
            call=30 * LAUNCH,
            call_backward=40 * LAUNCH,
            chunk=8 * LAUNCH,
            chunk_backward=10 * LAUNCH,
            row=4 / (REACHED * memory),  # read and written twice: gathered and combined
            row_backward=4 / (REACHED * memory),
            collective=8.4e-6,
            relay=2 * LAUNCH,
        ),
        overlap=0.9,
        memory=80 * 2**30,
        facts={"source": "from public data, not measured here", "gpus_per_node": 8},
    )


def preset(name: str) -> Machine:
    """The machine of a name: "a100" (NDv4: 8 GPUs a node, NVLink 3, 8 x 200 Gb/s) or "h100".

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"machine {name!r} is unknown: {suggest(name, PRESETS)}")
    return PRESETS[name]


PRESETS = {
    "a100": _cluster("a100", 312e12, 156e12, 2039e9, 300e9, 25e9, 235e9),
    "h100": _cluster("h100", 989e12, 495e12, 3350e9, 450e9, 50e9, REACHED * 450e9),
}
