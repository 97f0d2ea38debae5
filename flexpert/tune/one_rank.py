"""What there is to choose where one process holds all experts: capacity modes and kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.grid import RankGrid
from flexpert.parallel.group import Group
from flexpert.transport import LocalTransport

from .shape import LayerShape
from .volumes import computed_rows
from .workload import Workload

ALONE = RankGrid(replicas=1, expert_ranks=1, slices=1, ranks_per_node=1)
RATE = 1e11  # operations per second: predictions without a machine are only compared with each other


def local_layers(model: nn.Module) -> dict[str, tuple[LocalTransport, Any]]:
    """Transport and bank of each layer whose experts are all here, by name, which the transports take on."""
    found = {}
    for name, module in model.named_modules():
        transport: Any = getattr(module, "transport", None)
        if isinstance(transport, LocalTransport):
            transport.name = f"{name}.experts" if name else "experts"
            found[transport.name] = transport, module.experts
    return found


def group_of_one() -> Group:
    """What stands for the ranks' group: its sums are those of this process."""
    return Group("tuner", (0,), None, (0,))


def shape_of(bank: Any, dtype: torch.dtype | None) -> LayerShape:
    """The shape of a bank of equal experts on one rank."""
    return LayerShape.of(ALONE, bank, dtype=dtype, verify=False)


def plans_of(transport: LocalTransport, experts: Any, bank: Any, dtype: torch.dtype) -> list[ExecutionPlan]:
    """The plans that differ in speed alone, the one that runs without a tuner first.

    Args:
        transport: of the layer; without the fused operator there is one way only.
        experts: of the layer.
        bank: of them, the one that is tuned.
        dtype: that it computes in.
    """
    if not transport.fused:
        return [ExecutionPlan()]
    kernels = bank.kernels(dtype)
    plans = [ExecutionPlan(kernel=kernel) for kernel in kernels]
    if bank is experts and bank.pads(dtype):
        plans.append(ExecutionPlan(capacity="padded"))
    return plans


def work_of(shape: LayerShape, plan: ExecutionPlan, workload: Workload) -> float:
    """Seconds of the experts' products, forward and backward, at the rate `RATE`.

    Buffers are computed whole; "recompute" computes the first product once more.
    """
    rows = int(computed_rows(shape, plan, workload).sum())
    return rows * 3 * shape.flops_per_row * extra_work(shape, plan) / RATE


def extra_work(shape: LayerShape, plan: ExecutionPlan) -> float:
    """Products of a plan over those of the same plan with its kernel "auto"."""
    if plan.kernel != "recompute":
        return 1.0
    first = 2 * shape.inputs * shape.hidden_dim * shape.model_dim
    return 1 + first / (3 * shape.flops_per_row)


def plain(plan: ExecutionPlan) -> ExecutionPlan:
    """The plan with the usual kernel, as the cost model knows it."""
    return dataclasses.replace(plan, kernel="auto")
