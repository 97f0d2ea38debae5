"""A training step of a model on a cluster, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexpert.core.config import require_int
from flexpert.core.errors import ConfigError
from flexpert.parallel.timeline import Timeline
from flexpert.tune.workload import DTYPES

from .clocks import WAIT, Arrival, Clocks, Stage
from .cluster import Cluster
from .durations import Durations
from .job import JobPlan, check_dense, layer_shape, split_batch
from .layer import LayerCall
from .memory import Layer, memory_of_job
from .model import Block, Model
from .traffic import Synthetic, Traffic, workload


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step takes.

    Attributes:
        seconds: of the step, on every rank: the last thing a rank does is to wait for the others.
        parts: seconds by phase on the critical path, wherever in the cluster it runs; they add up to
            `seconds`. What travels counts where it is waited for.
        bottleneck: the longest of these phases.
        rank: the rank that waits least for others.
        straggler: whether the others wait for it: at least 5 % of the step more, in the median.
        waiting: the ranks' mean share of the step in which they wait for others.
        memory: bytes by use, on the rank that holds most.
        capacity: bytes of a device; 0: unknown.
        bytes_inside, bytes_between: of the experts' exchanges, on the rank that sends most.
        samples_per_second: of all ranks.
        utilization: the products' operations over what the ranks' rates allow.
        timelines: events of the watched ranks.
        parts_W: phases of all ranks.
        num_events: simulated, each on all ranks.
    """

    seconds: float
    parts: dict[str, float]
    bottleneck: str
    rank: int
    straggler: bool
    waiting: float
    memory: dict[str, int]
    capacity: int
    bytes_inside: int
    bytes_between: int
    samples_per_second: float
    utilization: float
    timelines: dict[int, Timeline] = field(repr=False)
    parts_W: dict[str, Tensor] = field(repr=False)
    num_events: int = 0

    @property
    def total_memory(self) -> int:
        """Bytes of a rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a device has that much memory, or does not say how much it has."""
        return not self.capacity or self.total_memory <= self.capacity

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without timelines."""
        names: tuple[str, ...] = ("seconds", "parts", "bottleneck", "rank", "straggler", "waiting")
        names += (
            "memory",
            "capacity",
            "bytes_inside",
            "bytes_between",
            "samples_per_second",
            "utilization",
            "num_events",
        )
        data = {name: getattr(self, name) for name in names}
        return {**data, "total_memory": self.total_memory, "fits": self.fits}


def simulate(
    model: Model,
    cluster: Cluster,
    batch: int,
    plan: JobPlan | None = None,
    *,
    traffic: Traffic | None = None,
    step: int = 0,
    backward: bool = True,
    watch: Sequence[int] = (),
) -> Step:
    """One training step; the same arguments give the same result.

    Args:
        model: what is trained.
        cluster: on what.
        batch: samples of all ranks in the step.
        plan: how; None for one replica, DDP, r = 1, nothing overlapped.
        traffic: where tokens go; None for equally many to each expert.
        step: which one, where the traffic drifts.
        backward: and the optimiser; False for a forward pass alone.
        watch: ranks whose events are kept.

    Raises:
        ConfigError: numbers that do not fit each other; what was given and what is possible is in it.
    """
    plan, traffic = plan or JobPlan(), traffic or Synthetic()
    require_int("step", step, least=0)
    check_dense(cluster, plan)
    passes = split_batch(batch, cluster, plan)
    for rank in watch:
        if not 0 <= rank < cluster.ranks:
            raise ConfigError(f"watch: rank {rank} is none of 0..{cluster.ranks - 1}")
    network = _Network(model, cluster, plan, traffic, passes.samples, step)
    clocks = Clocks(cluster, watch)
    if backward and passes.count > 1:
        network.run(clocks, last=False)
        clocks.repeat(passes.count - 1)
    network.run(clocks, last=True, backward=backward)
    if backward:
        network.optimize(clocks)
    return _result(model, batch, network, clocks, backward)


def memory_needed(
    model: Model, cluster: Cluster, batch: int, plan: JobPlan, traffic: Traffic | None = None
) -> dict[str, int]:
    """`Step.memory` without the step; arguments and errors as of `simulate`."""
    check_dense(cluster, plan)
    passes = split_batch(batch, cluster, plan)
    layers = layers_of(model, cluster, plan, traffic or Synthetic(), passes.samples, 0)
    return memory_of_job(model, plan, passes.samples, layers)


def layers_of(
    model: Model, cluster: Cluster, plan: JobPlan, traffic: Traffic, samples: int, step: int
) -> list[Layer | None]:
    """For each block its layer on the ranks and its rows, None without experts; equal ones are one object."""
    layers: list[Layer | None] = []
    known: dict[Any, Layer] = {}
    place = 0
    for block in model.blocks:
        if block.experts is None:
            layers.append(None)
            continue
        uniform = traffic.shares(place, step, block.experts.num_experts) is None
        key = (block.experts, block.tokens, 0 if uniform else place)
        if key not in known:
            shape = layer_shape(model, block.experts, cluster, plan)
            tokens = samples * block.tokens
            known[key] = shape, workload(traffic, block.experts, shape, tokens, layer=place, step=step)
        layers.append(known[key])
        place += 1
    return layers


class _Network:
    """A model's blocks, ready to be put on the clocks."""

    def __init__(
        self, model: Model, cluster: Cluster, plan: JobPlan, traffic: Traffic, samples: int, step: int
    ) -> None:
        self.model, self.plan, self.samples = model, plan, samples
        self.durations = Durations(cluster)
        self.layers = layers_of(model, cluster, plan, traffic, samples, step)
        made: dict[int, LayerCall] = {}
        for layer in filter(None, self.layers):
            if id(layer) not in made:
                made[id(layer)] = LayerCall(self.durations, layer[0], plan.execution, layer[1])
        self.calls = [made[id(layer)] if layer else None for layer in self.layers]
        self._stages: dict[tuple[str, int, bool], list[Stage]] = {}
        shard_W = torch.arange(cluster.ranks) // plan.dense_shards
        self.shards_W, self.copies_W = shard_W, torch.arange(cluster.ranks) % plan.dense_shards

    def run(self, clocks: Clocks, *, last: bool, backward: bool = True) -> None:
        """One pass, forward and backward; the last one of a step reduces the gradients."""
        blocks = list(zip(self.model.blocks, self.calls, strict=True))
        self._ordered(clocks, blocks, self._forward)
        if not backward:
            return
        reducing: list[Arrival] = []

        def back(clocks: Clocks, block: Block, call: LayerCall | None) -> None:
            if self.plan.checkpointing:
                self._forward(clocks, block, call)
            if call:
                call.backward(clocks)
            self._dense(clocks, block, backward=True)
            reducing.extend(self._reduce(clocks, block, last))
            if last and call:
                reducing.extend(call.average(clocks))

        self._ordered(clocks, blocks[::-1], back)
        for arrival in reducing:
            clocks.wait(arrival)

    def optimize(self, clocks: Clocks) -> None:
        """AdamW reads four tensors of each parameter and writes three."""
        stored = DTYPES[self.model.parameter_dtype].itemsize
        dense = self.model.dense_params / self.plan.dense_shards
        experts = sum(part.numel for layer in self.layers if layer for part in layer[0].parts)
        clocks.compute("optimizer", self.durations.copies(7 * stored * (dense + experts)))

    def _ordered(self, clocks: Clocks, blocks: list[tuple[Block, LayerCall | None]], run: Any) -> None:
        """Blocks one after the other; the next one's dense parameters are gathered while one is computed."""
        coming = self._gather(clocks, blocks[0][0])
        for place, (block, call) in enumerate(blocks):
            arrival = coming
            coming = self._gather(clocks, blocks[place + 1][0]) if place + 1 < len(blocks) else None
            if arrival:
                clocks.wait(arrival)
            run(clocks, block, call)

    def _gather(self, clocks: Clocks, block: Block) -> Arrival | None:
        if self.plan.dense_shards == 1 or not block.params:
            return None
        key = ("gather", block.params, False)
        if key not in self._stages:
            size = block.params * DTYPES[self.model.dtype].itemsize
            self._stages[key] = [self.durations.all_gather(size, self.shards_W)]
        return clocks.send("dense gather", self._stages[key], link="side")

    def _reduce(self, clocks: Clocks, block: Block, last: bool) -> list[Arrival]:
        if not block.params:
            return []
        key = ("reduce", block.params, last)
        if key not in self._stages:
            stages, size = [], block.params * DTYPES[self.model.parameter_dtype].itemsize
            if self.plan.dense_shards > 1:
                stages.append(self.durations.reduce_scatter(size, self.shards_W))
            if last and self.plan.dense_shards < len(self.shards_W):
                stages.append(self.durations.all_reduce(size / self.plan.dense_shards, self.copies_W))
            self._stages[key] = stages
        return [clocks.send("dense reduce", self._stages[key], link="side")] if self._stages[key] else []

    def _forward(self, clocks: Clocks, block: Block, call: LayerCall | None) -> None:
        self._dense(clocks, block, backward=False)
        if call:
            call.forward(clocks)

    def _dense(self, clocks: Clocks, block: Block, backward: bool) -> None:
        tokens, factor = self.samples * block.tokens, 2 if backward else 1
        itemsize = DTYPES[self.model.dtype].itemsize
        seconds = self.durations.products(factor * tokens * block.flops, tokens, self.model.dtype, backward)
        moved = 2 * tokens * block.activations * itemsize  # each is written once and read once
        if seconds or moved:
            clocks.compute("dense", seconds + self.durations.copies(factor * moved))


def _result(model: Model, batch: int, network: _Network, clocks: Clocks, backward: bool) -> Step:
    seconds = clocks.finish()
    waiting_W = clocks.parts_W[WAIT]
    rank = int(waiting_W.argmin())
    parts = {name: float(value_W[0]) for name, value_W in clocks.path.items()}
    machine = clocks.cluster.machine
    calls = [call for call in network.calls if call]
    none = torch.zeros(1, len(waiting_W), dtype=torch.int64)
    inside_W, between_W = (
        torch.cat([none, *(call.bytes_W[i][None] for call in calls)]).sum(0) for i in (0, 1)
    )
    most = int((inside_W + between_W).argmax())
    operations = model.flops_per_sample * batch * (3 if backward else 1)
    possible = machine.rate(model.dtype).forward[-1] * clocks.cluster.ranks * seconds
    return Step(
        seconds=seconds,
        parts=parts,
        bottleneck=max(parts, key=parts.__getitem__),
        rank=rank,
        waiting=float(waiting_W.mean()) / seconds,
        straggler=float(waiting_W.median() - waiting_W[rank]) > 0.05 * seconds,
        memory=memory_of_job(model, network.plan, network.samples, network.layers),
        capacity=clocks.cluster.memory,
        bytes_inside=int(inside_W[most]),
        bytes_between=int(between_W[most]),
        samples_per_second=batch / seconds,
        utilization=operations / possible,
        timelines=clocks.timelines,
        parts_W=clocks.parts_W,
        num_events=clocks.num_events,
    )
