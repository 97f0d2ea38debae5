"""Training steps of the tiny vision model against its dense twin under data parallelism.

    python -m benchmarks.parallel.vision [--bandwidth 1gbit]

Both models take the same images; a step is forward, backward, clipping and AdamW. The dense twin has the same
network without experts and the same FLOPs per token, so its throughput is what experts may cost nothing of.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from flexpert import RoutingContext, routing_scope
from flexpert.emulate import Cluster
from flexpert.models.swinv2_moe import SwinV2MoEForImageClassification, parameter_groups, preset
from flexpert.parallel import ExecutionPlan, ExpertMesh
from flexpert.train.config import ParallelConfig
from flexpert.train.parallel import ManyRanks, OneRank
from flexpert.train.world import World

from .timing import interleaved, record

WORLDS = (1, 2, 4, 8)
PLANS = {
    "r=0": ExecutionPlan(r=0),
    "r=1 degree=1": ExecutionPlan(r=1),
    "r=1 degree=2": ExecutionPlan(r=1, degree=2),
    "r=1 padded": ExecutionPlan(r=1, capacity="padded"),
}


class Trainer:
    """A model on all ranks, and its steps.

    Args:
        num_experts: 0 for the dense twin.
        images: of this rank, in a step.
    """

    def __init__(self, num_experts: int, images: int) -> None:
        world = World(dist.get_rank(), dist.get_world_size())  # each on a machine of its own
        torch.manual_seed(0)
        self.model = SwinV2MoEForImageClassification(preset("tiny", num_experts=num_experts))
        self.ranks = OneRank() if world.size == 1 else ManyRanks(world, layout=ParallelConfig(verify=False))
        self.ranks.prepare(self.model)
        groups = self.ranks.groups(parameter_groups(self.model, 0.05))
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        torch.manual_seed(1 + world.rank)
        config = self.model.config
        self.images = torch.randn(images, config.num_channels, config.image_size, config.image_size)
        self.labels = torch.randint(config.num_labels, (images,))

    @property
    def mesh(self) -> ExpertMesh | None:
        """Of the experts, where there are several ranks."""
        return getattr(self.ranks, "mesh", None)

    def step(self, plan: ExecutionPlan | None) -> None:
        """One step under a plan."""
        context = RoutingContext(all_reduce=self.ranks.all_reduce)
        with routing_scope(self.model, context=context, plan=plan) as scope:
            logits = self.model(pixel_values=self.images).logits
            loss = F.cross_entropy(logits, self.labels)
            if scope.infos:
                loss = loss + self.model.weighted_balance_loss(scope.losses)
            loss.backward()
        self.ranks.clip_grad_norm(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def on_rank(images: int, num_experts: int, repeats: int) -> list[dict[str, object]]:
    """The dense twin and the plans, in turns."""
    torch.set_num_threads(1)
    world = dist.get_world_size()
    dense, sparse = Trainer(0, images), Trainer(num_experts, images)
    # One process has no plan: all its experts are at hand.
    plans = PLANS if world > 1 else {"one process": None}
    calls: dict[str, Callable[[], None]] = {"dense": partial(dense.step, None)}
    calls |= {name: partial(sparse.step, plan) for name, plan in plans.items()}
    rows: list[dict[str, object]] = []
    for name, figures in interleaved(calls, repeats, apart=True).items():
        sent = 0
        if sparse.mesh is not None and name != "dense":
            sparse.mesh.traffic.reset()
            calls[name]()
            sent = sparse.mesh.traffic.inside + sparse.mesh.traffic.between
        total = torch.tensor([sent])
        dist.all_reduce(total)
        rate = images * world / figures["median_ms"] * 1e3
        row = {"world": world, "plan": name, **figures, "images_per_second": rate, "bytes": int(total)}
        rows.append(row)
    for row in rows:
        row["of_dense"] = row["images_per_second"] / rows[0]["images_per_second"]
    return rows


def main() -> None:
    """Measure on 1, 2, 4 and 8 ranks, one to a node, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32, help="per rank and step")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--bandwidth", default="1gbit")
    parser.add_argument("--latency", default="100us")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="print, and record nothing")
    o = parser.parse_args()
    rows = []
    for world in o.worlds:
        with Cluster(nodes=world, ranks=1, bandwidth=o.bandwidth, latency=o.latency) as cluster:
            rows += cluster.run(on_rank, o.images, o.experts, o.repeats, timeout=1800)[0]
            mode = cluster.mode
    table = [
        [
            str(row["world"]),
            str(row["plan"]),
            f"{row['median_ms']:.0f}",
            f"{row['images_per_second']:.0f}",
            f"{row['of_dense']:.0%}",
            f"{row['bytes'] / 2**20:.2f}",
        ]
        for row in rows
    ]
    if o.dry:
        print("\n".join("  ".join(line) for line in table), flush=True)
        return
    words = (
        f"The tiny SwinV2-MoE ({o.experts} experts, top-1, capacity factor 1.25) and its dense twin under "
        f"DDP, {o.images} images per rank, fp32, one rank to a node, {o.bandwidth} and {o.latency} one "
        f"way ({mode}): median milliseconds of a training step of {o.repeats}, the slowest rank counts. All "
        f"ranks share two cores, so more ranks are not faster. MiB: what the experts' exchange sends in a "
        f"step, all ranks together."
    )
    header = ["ranks", "plan", "ms", "images/s", "of dense", "MiB"]
    record("vision", words, header, table, rows)


if __name__ == "__main__":
    main()
