"""A machine's small constants, as they are inside of a layer's call.

What a call, a chunk or a message costs can be measured by itself. In a layer on all ranks, where they wait
for each other and may share processors, it is another number. So whole layers are timed too, small ones, and
the constants become those with which the model explains these times best; what was measured by itself holds
where the layers do not tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexpert.core.plan import ExecutionPlan

from .collectives import Clock
from .least_squares import nonnegative
from .machine import Machine
from .step import Times
from .volumes import Volumes
from .workload import LayerShape, Workload

# Each constant, and what counts as some of it where it was measured to be less, or not at all.
CONSTANTS = {
    "overheads.call": 1e-5,
    "overheads.call_backward": 1e-5,
    "overheads.chunk": 1e-5,
    "overheads.chunk_backward": 1e-5,
    "overheads.row": 1e-9,
    "overheads.row_backward": 1e-9,
    "overheads.cut": 1e-9,
    "overheads.cut_backward": 1e-9,
    "overheads.collective": 1e-5,
    "overheads.relay": 1e-5,
    "inside.per_message": 1e-5,
    "between.per_message": 1e-5,
    "exposed": 0.5,  # 1 - overlap
    "products": 1.0,  # of the rates' times
}
# Of what was measured by itself: there is work in a call that has no other name, and products take time.
FLOORS = {
    "overheads.call": 0.25,
    "overheads.call_backward": 0.25,
    "overheads.chunk": 0.25,
    "overheads.chunk_backward": 0.25,
    "products": 0.5,
}
STEP = 0.01  # of a unit, for the slopes
TRUST = 0.05  # doubling what was measured by itself weighs as much as this error of one time
ROUNDS = 3


@dataclass(frozen=True)
class Observation:
    """A layer's call that was timed.

    Attributes:
        shape, workload, plan: of the call.
        forward, total: seconds of the forward pass, and with the backward pass.
    """

    shape: LayerShape
    workload: Workload
    plan: ExecutionPlan
    forward: float
    total: float


def fitted(machine: Machine, observations: Sequence[Observation]) -> Machine:
    """The machine with constants that explain the observations."""
    loads = {id(o.workload): Volumes(o.shape, o.workload) for o in observations}
    measured = [time for o in observations for time in (o.forward, o.total)]

    def errors(candidate: Machine) -> list[float]:
        """Of each time: (predicted - measured) / measured."""
        clocks = {id(o.shape): Clock(o.shape, candidate) for o in observations}
        found = []
        for o in observations:
            times = Times(clocks[id(o.shape)], o.workload, loads[id(o.workload)])
            found += [times.of(o.plan, backward=backward)[1] for backward in (False, True)]
        return [f / m - 1 for f, m in zip(found, measured, strict=True)]

    before = values_of(machine)
    names = list(CONSTANTS)
    units = {name: max(before[name], least) for name, least in CONSTANTS.items()}
    floors = [FLOORS.get(name, 0.0) * before[name] / units[name] for name in names]
    now = before
    for _ in range(ROUNDS):  # the model is not quite linear in them
        base, columns = errors(with_values(machine, now)), []
        for name in names:
            moved = errors(with_values(machine, now | {name: now[name] + STEP * units[name]}))
            columns.append([(m - b) / STEP for m, b in zip(moved, base, strict=True)])
        equations = [list(row) for row in zip(*columns, strict=True)]
        # What is unknown is by how much each constant, in its unit, is above its floor.
        here = [now[name] / units[name] - floor for name, floor in zip(names, floors, strict=True)]
        aims = [
            sum(a * x for a, x in zip(row, here, strict=True)) - error
            for row, error in zip(equations, base, strict=True)
        ]
        for i, (name, floor) in enumerate(zip(names, floors, strict=True)):
            equations.append([TRUST * (i == j) for j in range(len(names))])
            aims.append(TRUST * (before[name] / units[name] - floor))
        above = nonnegative(equations, aims)
        now = {n: (x + f) * units[n] for n, x, f in zip(names, above, floors, strict=True)}
    return with_values(machine, now)


def values_of(machine: Machine) -> dict[str, float]:
    """The constants by name."""
    found = {}
    for name in CONSTANTS:
        place, _, field = name.partition(".")
        found[name] = getattr(getattr(machine, place), field) if field else 1.0
    return found | {"exposed": 1.0 - machine.overlap}


def with_values(machine: Machine, values: dict[str, float]) -> Machine:
    """The machine with other constants."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        place, _, field = name.partition(".")
        if name == "exposed":
            changes["overlap"] = min(1.0, max(0.0, 1.0 - value))
            continue
        if name == "products":
            changes["rates"] = {dtype: rate.slower(value) for dtype, rate in machine.rates.items()}
            continue
        owner = changes.get(place, getattr(machine, place))
        changes[place] = dataclasses.replace(owner, **{field: value})
    return dataclasses.replace(machine, **changes)
