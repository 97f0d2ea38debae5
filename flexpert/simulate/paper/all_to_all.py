"""Table 2: the share of the all-to-all in a layer's time. Figure 18: linear against 2DH."""

from __future__ import annotations

import math

import torch

from flexpert.core.plan import ExecutionPlan
from flexpert.simulate.clocks import Clocks
from flexpert.simulate.durations import Durations
from flexpert.tune.cost import transfers_of_plan

from .rows import Row, Table, full_capacity, layer_on, parts_of_layer, testbed

# GPUs: (layer ms, computation ms, all-to-all ms, share of the all-to-all in %, possible gain by overlap)
SHARE = {
    16: (560.9, 371.8, 189.1, 33.7, 1.51),
    64: (698.9, 375.1, 323.8, 46.3, 1.86),
    256: (866.4, 386.3, 491.3, 56.7, 1.76),
}
MIB = 2**20
SIZES = (1, 32, 256)
SCALES = (64, 128, 256, 512, 1024, 2048, 4096)


def all_to_all_share() -> Table:
    """Table 2: D = H = 4096, two experts and 65,536 tokens of each GPU."""
    rows, shares = [], []
    for ranks, (total, computed, sent, share, gain) in SHARE.items():
        shape = layer_on(ranks, model_dim=4096, hidden_dim=4096, num_experts=2 * ranks)
        workload = full_capacity(shape, 65_536, top_k=2)
        parts = parts_of_layer(testbed(ranks), shape, workload, ExecutionPlan(capacity="padded"))
        ours_total = 1e3 * sum(parts.values())
        ours_sent = 1e3 * (parts["dispatch"] + parts["combine"])
        part = ours_sent / ours_total
        shares.append(part)
        congested = "the wire alone: congestion between many nodes is not modelled" if ranks == 256 else ""
        rows += [
            Row(name=f"{ranks} GPUs: layer", paper=total, ours=ours_total, unit="ms"),
            Row(
                name=f"{ranks} GPUs: computation", paper=computed, ours=ours_total - ours_sent, unit="ms",
                note="products at cuBLAS's full TF32 rate; the paper's reach 56 % of it",
            ),
            Row(name=f"{ranks} GPUs: all-to-all", paper=sent, ours=ours_sent, unit="ms", note=congested),
            Row(name=f"{ranks} GPUs: share of the all-to-all", paper=share, ours=100 * part, unit="%"),
            Row(
                name=f"{ranks} GPUs: possible gain by overlap", paper=gain, ours=1 / max(part, 1 - part),
                unit="x",
            ),
        ]  # fmt: skip
    return Table(
        title="share of the all-to-all in the time of one layer",
        rows=rows,
        claims=[
            ("the share grows with the number of GPUs", shares == sorted(shares)),
            ("it is a third at least from 16 GPUs on", min(shares) > 1 / 3),
        ],
        notes=[
            "The paper gives neither top-k nor the dtype: top-2, capacity factor 1 and fp32 (TF32 products) "
            "are taken, with which the bytes of the all-to-all explain its time at 16 and 64 GPUs."
        ],
    )


def linear_against_2dh() -> Table:
    """Figure 18: from which number of GPUs on the hierarchical all-to-all is faster, by bytes of a rank."""
    times = all_to_all_times()
    rows, crossings = [], []
    for size in SIZES:
        faster = [n for n in SCALES if times["2dh", size][n] < times["linear", size][n]]
        crossing = min(faster, default=2 * SCALES[-1])
        crossings.append(crossing)
        rows.append(Row(name=f"{size} MiB: 2DH is faster from", paper=None, ours=crossing, unit="GPUs"))
        for ranks in SCALES:
            gain = times["linear", size][ranks] / times["2dh", size][ranks]
            rows.append(Row(name=f"{size} MiB, {ranks} GPUs: linear / 2DH", paper=None, ours=gain, unit="x"))
    middle = 2 ** (sum(map(math.log2, crossings)) / len(crossings))
    rows.append(
        Row(
            name="2DH is faster from, geometric mean of the sizes", paper=256, ours=middle, unit="GPUs",
            note="the maintainers': slower below about 256",
        )
    )  # fmt: skip
    return Table(
        title="linear against two-dimensional hierarchical all-to-all",
        rows=rows,
        claims=[
            ("2DH wins at 1 MiB at every scale drawn", crossings[0] == SCALES[0]),
            ("the larger the messages, the more GPUs it takes", crossings == sorted(crossings)),
            ("at 256 MiB linear wins at 64 GPUs and 2DH at 2,048", 64 < crossings[2] <= 2048),
            ("the crossing is within a factor of two of 256 GPUs", 128 <= middle <= 512),
        ],
        notes=["The figure is drawn, not printed: only its statements are compared."],
    )


def all_to_all_times() -> dict[tuple[str, int], dict[int, float]]:
    """Seconds of one exchange by algorithm, MiB of a rank and ranks."""
    times: dict[tuple[str, int], dict[int, float]] = {}
    for ranks in SCALES:
        cluster = testbed(ranks)
        shape = layer_on(ranks, model_dim=64, hidden_dim=64, num_experts=ranks)
        for size in SIZES:
            workload = full_capacity(shape, size * MIB // 256, top_k=1)  # 256 bytes of a row
            for algorithm in ("linear", "2dh"):
                plan = ExecutionPlan(algorithm=algorithm, capacity="padded")
                there, back = (
                    t
                    for t in transfers_of_plan(shape, plan, workload, backward=False)
                    if t.name in ("dispatch", "combine")
                )
                clocks = Clocks(cluster)
                clocks.wait(
                    clocks.send("dispatch", Durations(cluster).exchange(shape, there, back, algorithm, 1.0))
                )
                times.setdefault((algorithm, size), {})[ranks] = float(torch.max(clocks.now_W))
    return times
