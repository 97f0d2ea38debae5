"""The single layer of the paper against a static baseline.

    python -m benchmarks.parallel.baseline

The baseline is a layer as GShard (arXiv 2006.16668) and Fairseq's MoE compute it: dispatch and combine as
einsums with a (tokens, experts, capacity) mask, expert parallel, linear all-to-all of padded buffers, nothing
overlapped. Ours has the same router, experts and capacity, and the best of its plans.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert import MoE, MoEConfig
from flexpert.core.routing import CapacityRouting
from flexpert.emulate import Cluster
from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize
from flexpert.parallel.all_to_all import all_to_all
from flexpert.parallel.mesh import ExpertMesh

from .timing import interleaved, record


def einsum_layer(layer: MoE, mesh: ExpertMesh, x_TD: Tensor) -> Tensor:
    """The baseline, with the parallelized layer's router and this rank's experts."""
    from flexpert.core.context import RoutingContext

    routing = layer.router(x_TD, RoutingContext())
    assert isinstance(routing, CapacityRouting)
    tokens, experts, capacity = x_TD.shape[0], routing.num_experts, routing.buffer_capacity
    real = int(routing.counts_E.sum())
    unit_N, expert_N, slot_N = routing.unit_N[:real], routing.expert_N()[:real], routing.slot_N[:real]
    place_N = (unit_N * experts + expert_N) * capacity + slot_N
    combine_TEC = x_TD.new_zeros(tokens * experts * capacity).index_put((place_N,), routing.weight_N[:real])
    combine_TEC = combine_TEC.view(tokens, experts, capacity)
    dispatch_TEC = (combine_TEC.detach() != 0).to(x_TD.dtype)
    sent_ECD = torch.einsum("tec,td->ecd", dispatch_TEC, x_TD)
    algorithm, world = mesh.algorithms["linear"], mesh.whole.size
    splits = algorithm.known(torch.full((world, world, experts // world), capacity))
    arrived = all_to_all(sent_ECD.flatten(0, 1), algorithm, splits)
    rows_eND = arrived.view(world, experts // world, capacity, -1).transpose(0, 1).flatten(1, 2)
    w1, w2 = layer.experts.w1.to_local(), layer.experts.w2.to_local()
    y_eND = torch.bmm(F.gelu(torch.bmm(rows_eND, w1.mT)), w2.mT)
    back = y_eND.view(experts // world, world, capacity, -1).transpose(0, 1).flatten(0, 2)
    y_ECD = _return(back, mesh, splits).view(experts, capacity, -1)
    return torch.einsum("tec,ecd->td", combine_TEC, y_ECD)


def _return(rows: Tensor, mesh: ExpertMesh, splits: object) -> Tensor:
    # Parts are equal, so the way back is the same exchange.
    return all_to_all(rows, mesh.algorithms["linear"], splits)


def on_rank(shape: dict[str, int], local: int, repeats: int) -> list[dict[str, object]]:
    """Baseline and plans in turns, forward and forward + backward."""
    world = torch.distributed.get_world_size()
    mesh = expert_mesh(shape["experts"], ranks_per_node=local)
    torch.manual_seed(0)
    layer = MoE(
        MoEConfig(
            model_dim=shape["model_dim"],
            hidden_dim=shape["hidden_dim"],
            num_experts=shape["experts"],
            top_k=2,
            capacity_factor=1.0,
            renormalize=True,
        )
    )
    parallelize(layer, mesh, verify=False)
    torch.manual_seed(1 + torch.distributed.get_rank())
    x = torch.randn(shape["tokens"], shape["model_dim"], requires_grad=True)
    plans = {"baseline": None} | {
        f"r={r} degree={d} {a} {c}": ExecutionPlan(r=r, degree=d, algorithm=a, capacity=c)
        for r, d, a, c in itertools.product((0, 1), (1, 2, 4), ("linear", "2dh"), ("padded", "ragged"))
        if r or (d == 1 and a == "linear" and c == "padded")
    }

    def forward(plan: ExecutionPlan | None) -> Tensor:
        return einsum_layer(layer, mesh, x) if plan is None else layer(x, plan=plan)

    def both(plan: ExecutionPlan | None) -> None:
        forward(plan).sum().backward()
        layer.zero_grad(set_to_none=True)

    want = forward(None)
    for plan in plans.values():
        assert torch.allclose(forward(plan), want, atol=1e-4), plan
    rows: list[dict[str, object]] = []
    for mode, run in (("forward", forward), ("forward+backward", both)):
        figures = interleaved({name: partial(run, plan) for name, plan in plans.items()}, repeats)
        rows += [{"mode": mode, "plan": name, "world": world, **row} for name, row in figures.items()]
    return rows


def main() -> None:
    """Measure on 4 nodes of 4 ranks and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="per rank")
    parser.add_argument("--model-dim", type=int, default=128)
    parser.add_argument("--hidden-dim", type=int, default=128)
    parser.add_argument("--bandwidth", default="1gbit")
    parser.add_argument("--latency", default="100us")
    parser.add_argument("--repeats", type=int, default=5)
    o = parser.parse_args()
    shape = {"tokens": o.tokens, "model_dim": o.model_dim, "hidden_dim": o.hidden_dim, "experts": 32}
    with Cluster(nodes=4, ranks=4, bandwidth=o.bandwidth, latency=o.latency) as cluster:
        rows = cluster.run(on_rank, shape, 4, o.repeats, timeout=1800)[0]
        mode = cluster.mode
    table = []
    for name in ("forward", "forward+backward"):
        part = [row for row in rows if row["mode"] == name]
        base = part[0]["median_ms"]
        table += [
            [name, row["plan"], f"{row['median_ms']:.0f}", f"{base / row['median_ms']:.2f}x"]
            for row in sorted(part, key=lambda row: row["median_ms"])
        ]
    words = (
        f"16 ranks on 4 nodes, {o.bandwidth} and {o.latency} one way ({mode}); {o.tokens} tokens per rank, "
        f"D {o.model_dim}, F {o.hidden_dim}, 32 experts (2 per rank), top-2, capacity factor 1, fp32: "
        f"median milliseconds of {o.repeats}, the slowest rank counts. Tokens / F is "
        f"{o.tokens / o.hidden_dim:g}; the paper's layer has 8 (16,384 tokens, F 2,048). It is scaled to two "
        f"cores that all ranks share."
    )
    header = ["", "plan", "ms", "gain over the baseline"]
    record("baseline", words, header, table, rows)


if __name__ == "__main__":
    main()
