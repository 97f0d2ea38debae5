"""The best parallel plan of a model on a cluster: every plan that may be, ranked by predicted time.

found = recommend(model, cluster, batch=512)
print(found.best.plan.describe(), found.best.step.seconds)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flexpert.core.config import require_int
from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.mesh import mesh_shape
from flexpert.tune.cost import candidates

from .cluster import Cluster
from .job import JobPlan, layer_shape, split_batch
from .model import Model
from .step import Step, memory_needed, simulate
from .traffic import Traffic

MARGIN = 0.9  # of a device's memory: the allocator's fragments and the context need some


@dataclass(frozen=True)
class Choice:
    """A plan and the step that it takes."""

    plan: JobPlan
    step: Step

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"plan": self.plan.to_dict(), "describe": self.plan.describe(), **self.step.to_dict()}


@dataclass(frozen=True)
class Refusal:
    """A plan that does not fit, and the memory by use that it would need."""

    plan: JobPlan
    memory: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of a rank."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "plan": self.plan.to_dict(),
            "describe": self.plan.describe(),
            "memory": self.memory,
            "total_memory": self.total,
        }


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Plans in order of time.

    Attributes:
        ranked: that fit, the fastest first.
        refused: that do not fit, the one that needs least memory first.
        sensitivity: what changes, to the best plan then and how many times as fast it is per sample.
        considered: plans that were simulated, or refused for their memory.
        budget: bytes that a rank may take.
    """

    ranked: list[Choice]
    refused: list[Refusal]
    sensitivity: dict[str, dict[str, Any]]
    considered: int
    budget: int

    @property
    def best(self) -> Choice:
        """The fastest plan that fits."""
        return self.ranked[0]

    def to_dict(self, top: int = 10) -> dict[str, Any]:
        """Plain data, with the `top` fastest plans and the first that do not fit."""
        return {
            "best": self.best.to_dict(),
            "ranked": [choice.to_dict() for choice in self.ranked[:top]],
            "refused": [choice.to_dict() for choice in self.refused[:3]],
            "num_refused": len(self.refused),
            "sensitivity": self.sensitivity,
            "considered": self.considered,
            "budget": self.budget,
        }


def recommend(
    model: Model,
    cluster: Cluster,
    batch: int,
    *,
    traffic: Traffic | None = None,
    sensitivity: bool = True,
) -> Recommendation:
    """The plans for a model on a cluster.

    Every pair of meshes is tried with each r, the largest micro-batch that fits, and, where that is not the
    whole batch of a rank, with checkpointing; the fastest two then with every degree, algorithm and capacity
    mode.

    Args:
        model: what is trained.
        cluster: on what.
        batch: samples of all ranks in a step.
        traffic: where tokens go; None for equally many to each expert.
        sensitivity: also search with other bandwidths, memory, batch and capacity.

    Raises:
        ConfigError: nothing fits; the message has the plan that needs least, and how much.
    """
    require_int("batch", batch, least=1)
    ranked, refused = search(model, cluster, batch, traffic)
    budget = int(MARGIN * cluster.memory)
    if not ranked:
        least = refused[0]
        largest = max(least.memory, key=least.memory.__getitem__)
        raise ConfigError(
            f"{model.name} with batch={batch} does not fit {cluster.ranks} ranks of {budget / 2**30:.1f} GiB "
            f"({100 * MARGIN:.0f} % of a device): of {len(refused)} plans {least.plan.describe()!r} needs "
            f"least, {least.total / 2**30:.1f} GiB of a rank, most of it {largest} "
            f"({least.memory[largest] / 2**30:.1f} GiB); take more nodes, a smaller batch or a smaller model"
        )
    changes = _sensitivity(model, cluster, batch, traffic, ranked[0]) if sensitivity else {}
    return Recommendation(
        ranked=ranked,
        refused=refused,
        sensitivity=changes,
        considered=len(ranked) + len(refused),
        budget=budget,
    )


def search(
    model: Model, cluster: Cluster, batch: int, traffic: Traffic | None
) -> tuple[list[Choice], list[Refusal]]:
    """Plans that fit in order of time, and the others in order of memory."""
    budget = MARGIN * cluster.memory
    tried: dict[JobPlan, Step] = {}
    refused: dict[JobPlan, Refusal] = {}

    def fits(plan: JobPlan) -> bool:
        if plan in tried:
            return True
        if plan not in refused:
            refusal = Refusal(plan, memory_needed(model, cluster, batch, plan, traffic))
            if not budget or refusal.total <= budget:
                return True
            refused[plan] = refusal
        return False

    def attempt(plan: JobPlan) -> None:
        if plan not in tried and fits(plan):
            tried[plan] = simulate(model, cluster, batch, plan, traffic=traffic)

    split_batch(batch, cluster, JobPlan())
    for layout in _layouts(model, cluster):
        for plan in _passes(layout, batch // cluster.ranks, fits):
            attempt(plan)
    order = sorted(tried, key=lambda plan: tried[plan].seconds)
    for plan in _different_meshes(order)[:2]:
        for execution in _executions(model, cluster, plan):
            attempt(execution)
    ranked = [Choice(plan, step) for plan, step in tried.items()]
    ranked.sort(key=lambda choice: choice.step.seconds)
    return ranked, sorted(refused.values(), key=lambda refusal: refusal.total)


def _layouts(model: Model, cluster: Cluster) -> Iterator[JobPlan]:
    """Meshes of experts and dense layers, with each r."""
    shards = sorted({1, cluster.devices, cluster.ranks})
    for mesh in _meshes(model, cluster):
        for r, dense in itertools.product(_legal_r(model, cluster, mesh), shards):
            yield dataclasses.replace(mesh, dense_shards=dense, execution=ExecutionPlan(r=r))


def _passes(layout: JobPlan, each: int, fits: Callable[[JobPlan], bool]) -> Iterator[JobPlan]:
    """The layout with the largest micro-batch that fits; if that is not all, also with checkpointing."""
    sizes = [n for n in range(each, 0, -1) if each % n == 0]
    for again in (False, True):
        for size in sizes:
            micro = None if size == each else size
            plan = dataclasses.replace(layout, micro_batch=micro, checkpointing=again)
            if fits(plan):
                yield plan
                if micro is None:
                    return
                break


def _meshes(model: Model, cluster: Cluster) -> list[JobPlan]:
    """Replicas of the experts: as many ranks of a replica as powers of two, nodes and experts allow."""
    if not model.num_experts:
        return [JobPlan()]
    ranks = cluster.ranks
    sizes = {ranks, cluster.devices, model.num_experts, *(2**i for i in range(ranks.bit_length()))}
    found = []
    for size in sorted(sizes, reverse=True):
        if ranks % size == 0 and (size % cluster.devices == 0 or cluster.devices % size == 0):
            plan = JobPlan(replicas=ranks // size)
            try:
                mesh_shape(model.num_experts, ranks, plan.replicas)
                for experts in model.expert_parts:
                    layer_shape(model, experts, cluster, plan)
            except ConfigError:
                continue  # experts and ranks that do not divide each other
            found.append(plan)
    if not found:
        mesh_shape(model.num_experts, ranks)  # says which numbers would
    return found[:6]


def _legal_r(model: Model, cluster: Cluster, mesh: JobPlan) -> list[int]:
    parts = model.expert_parts
    if not parts:
        return [1]
    legal = layer_shape(model, parts[0], cluster, mesh).legal_r
    # With whole experts on each rank r = 0 gathers what r = 1 sends no row for; S and 1 bracket the others.
    return sorted({0, 1, legal[-1], legal[len(legal) // 2]})


def _executions(model: Model, cluster: Cluster, plan: JobPlan) -> Iterator[JobPlan]:
    """The plan with every execution plan that its layers can run."""
    parts = model.expert_parts
    if not parts:
        return
    legal = _legal_r(model, cluster, plan)
    for execution in candidates(layer_shape(model, parts[0], cluster, plan)):
        if execution.r in legal:
            yield dataclasses.replace(plan, execution=execution)


def _different_meshes(order: list[JobPlan]) -> list[JobPlan]:
    """The first plan of each pair of meshes, in order."""
    found: dict[tuple[int, int], JobPlan] = {}
    for plan in order:
        found.setdefault((plan.replicas, plan.dense_shards), plan)
    return list(found.values())


def _sensitivity(
    model: Model, cluster: Cluster, batch: int, traffic: Traffic | None, best: Choice
) -> dict[str, dict[str, Any]]:
    """What would change the answer, and how much faster a sample would be."""
    machine = cluster.machine
    between = dataclasses.replace(machine.between, bandwidth=2 * machine.between.bandwidth)
    slower = dataclasses.replace(machine.between, bandwidth=machine.between.bandwidth / 2)
    cases: dict[str, Callable[[], tuple[Model, Cluster, int]]] = {
        "bandwidth between nodes x 2": lambda: (model, cluster.with_machine(between=between), batch),
        "bandwidth between nodes / 2": lambda: (model, cluster.with_machine(between=slower), batch),
        "batch x 2": lambda: (model, cluster, 2 * batch),
        "memory of a device / 2": lambda: (model, cluster.with_machine(memory=machine.memory // 2), batch),
    }
    if any(block.experts and block.experts.capacity_factor for block in model.blocks):
        cases["capacity factor x 2"] = lambda: (_with_double_capacity(model), cluster, batch)
    found: dict[str, dict[str, Any]] = {}
    for name, make in cases.items():
        ranked, refused = search(*make(), traffic)
        if not ranked:
            needs = refused[0].total
            found[name] = {"fits": False, "changes": True, "least_memory": needs}
            continue
        speed = ranked[0].step.samples_per_second / best.step.samples_per_second
        found[name] = {
            "fits": True,
            "changes": ranked[0].plan != best.plan,
            "plan": ranked[0].plan.to_dict(),
            "describe": ranked[0].plan.describe(),
            "bottleneck": ranked[0].step.bottleneck,
            "speed": speed,
        }
    return found


def _with_double_capacity(model: Model) -> Model:
    blocks = tuple(
        dataclasses.replace(
            block,
            experts=dataclasses.replace(
                block.experts, capacity_factor=2 * (block.experts.capacity_factor or 0) or None
            ),
        )
        if block.experts
        else block
        for block in model.blocks
    )
    return dataclasses.replace(model, blocks=blocks)
