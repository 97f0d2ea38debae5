"""The time, bytes and memory of a plan, predicted from a layer, its rows and a machine.

How the time is made up is told in docs/cost_model.md. Nothing here needs a process group.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import Transfer, transfers_of_call

from .collectives import Clock
from .machine import Machine
from .memory import memory_of
from .step import Times
from .workload import DTYPES, LayerShape, Workload

DEGREES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a plan costs.

    Attributes:
        seconds: of one call on the rank that takes longest; forward, and backward where that was asked for.
        parts: seconds by phase; where phases overlap their sum is more than `seconds`.
        bytes_inside, bytes_between: that the rank which sends most sends to others of its node, and of other
            nodes.
        memory: bytes of one rank at the peak of a step, the one that holds most.
    """

    seconds: float
    parts: dict[str, float]
    bytes_inside: int
    bytes_between: int
    memory: int

    @property
    def bottleneck(self) -> str:
        """The phase that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


def predict(
    shape: LayerShape,
    plan: ExecutionPlan,
    workload: Workload,
    machine: Machine,
    *,
    backward: bool = True,
    optimizer: bool = False,
) -> Cost:
    """What one call of a layer costs under a plan.

    Args:
        shape: the layer and its ranks.
        plan: of the call.
        workload: its rows.
        machine: of the ranks.
        backward: count the backward pass too.
        optimizer: count a step of AdamW on the experts too.

    Raises:
        ConfigError: a plan that these ranks cannot run, or a dtype the machine has no rates of.
        InputError: a workload of another layer.
    """
    check(shape, plan)
    workload.check(shape)
    clock = Clock(shape, machine)
    parts, seconds = Times(clock, workload).of(plan, backward=backward)
    if optimizer:
        parts["optimizer"] = clock.optimizer()
        seconds += parts["optimizer"]
    inside_W, between_W = rank_bytes(transfers_of_plan(shape, plan, workload, backward=backward))
    busiest = int((inside_W + between_W).argmax())
    return Cost(
        seconds=seconds,
        parts=parts,
        bytes_inside=int(inside_W[busiest]),
        bytes_between=int(between_W[busiest]),
        memory=sum(memory_of(shape, plan, workload).values()),
    )


class Predictor:
    """Predicts seconds of many plans: as `predict`, at a fraction of its cost for each plan but the first.

    Args:
        machine: of the ranks.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._clocks: dict[LayerShape, Clock] = {}
        self._times: tuple[Clock, Workload, Times] | None = None  # of the last load

    def __call__(self, shape: LayerShape, plan: ExecutionPlan, workload: Workload) -> float:
        """Seconds of a call, forward and backward.

        Raises:
            ConfigError: a plan that these ranks cannot run, or a dtype the machine has no rates of.
            InputError: a workload of another layer.
        """
        check(shape, plan)
        clock = self._clocks.get(shape)
        if clock is None:
            clock = self._clocks[shape] = Clock(shape, self.machine)
        last = self._times
        if last is None or last[0] is not clock or last[1] is not workload:
            workload.check(shape)
            last = self._times = clock, workload, Times(clock, workload)
        return last[2].of(plan)[1]


def check(shape: LayerShape, plan: ExecutionPlan) -> None:
    """Refuse a plan that a layer's ranks cannot run.

    Raises:
        ConfigError: r is no divisor of the slices, or the hierarchical all-to-all does not fit the nodes.
    """
    if plan.r not in shape.legal_r:
        raise ConfigError(
            f"plan: r={plan.r} with {shape.slices} slices per expert; legal values are "
            f"{', '.join(map(str, shape.legal_r))}"
        )
    if plan.algorithm == "2dh" and shape.local_ranks is None:
        raise ConfigError(
            f"plan: algorithm='2dh' with {shape.ranks} ranks of a replica on nodes of "
            f"{shape.ranks_per_node}: not equally many on each; use 'linear'"
        )


def candidates(shape: LayerShape) -> list[ExecutionPlan]:
    """Every plan that a layer's ranks can run: each legal r, degree, algorithm and capacity mode.

    Codecs other than "none" round, so they are not the tuner's to choose. r = 0 exchanges no rows: it comes
    once. The hierarchical algorithm is left out where it is the linear one: on one node, or with one rank on
    each.
    """
    local = shape.grid.places_per_node()
    flat = local is None or local in (1, shape.ranks)
    algorithms = ("linear",) if flat else ("linear", "2dh")
    plans = [ExecutionPlan(r=0)]
    for r, degree, algorithm, capacity in itertools.product(
        shape.legal_r[1:], DEGREES, algorithms, ("ragged", "padded")
    ):
        plans.append(ExecutionPlan(r=r, degree=degree, algorithm=algorithm, capacity=capacity))
    return plans


def transfers_of_plan(
    shape: LayerShape, plan: ExecutionPlan, workload: Workload, *, backward: bool = True
) -> list[Transfer]:
    """What all ranks send; see `flexpert.parallel.predict.transfers_of_call`."""
    return transfers_of_call(
        shape.grid,
        shape.parts,
        plan,
        workload.rows_PE,
        widths=(shape.model_dim, shape.output_dim),
        dtype=DTYPES[shape.dtype],
        capacity=workload.capacity,
        verify=shape.verify,
        backward=backward,
    )


def rank_bytes(transfers: list[Transfer]) -> tuple[Tensor, Tensor]:
    """int64 (W,) each: bytes that every rank sends inside its node and to other nodes."""
    return (
        torch.stack([transfer.inside_W for transfer in transfers]).sum(0),
        torch.stack([transfer.between_W for transfer in transfers]).sum(0),
    )
