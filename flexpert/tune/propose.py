"""What a bucket that was never met begins with: plans, predictions, and what similar buckets found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexpert.core.plan import ExecutionPlan

from .candidate import Candidate, corrected
from .dictionary import Dictionary, Key
from .entry import Entry
from .gather import Seen
from .limits import Limits
from .shortlist import shortlist
from .workload import LayerShape, Workload

CostFunction = Callable[[LayerShape, ExecutionPlan, Workload], float]  # predicted seconds of a call
_FEW = 8  # plans, all of which are predicted


@dataclass(frozen=True)
class TunedLayer:
    """A layer whose plans are chosen.

    Attributes:
        shape: of its largest bank.
        experts: where that bank's experts are among the layer's.
        plans: that it can run.
        kernels: others than the usual one with which every rank can run each of them.
    """

    shape: LayerShape
    experts: slice
    plans: tuple[ExecutionPlan, ...]
    kernels: tuple[str, ...] = ()


def propose(
    layer: TunedLayer, seen: Seen, key: Key, dictionary: Dictionary, cost: CostFunction, limits: Limits
) -> Entry:
    """The entry of a new bucket: predictions less the errors that they had in the most similar one.

    The winners of similar buckets are tried although the model would not.
    """
    workload = workload_of(layer.shape, seen)
    found = _candidates(layer, lambda plan: cost(layer.shape, plan, workload))
    similar = dictionary.nearest(*key)
    if similar:
        found = corrected(found, similar[0].search.errors())
    hints = list(dict.fromkeys(entry.search.plan for entry in similar))
    return Entry.begin(layer.shape, found, limits, hints, kernels=layer.kernels)


def workload_of(shape: LayerShape, seen: Seen) -> Workload:
    """A step's calls as the model wants them: each rank with its share of every expert's rows."""
    total_E = torch.tensor(seen.counts, dtype=torch.int64)
    each_E = (total_E + shape.world // 2) // shape.world
    return Workload(
        rows_PE=each_E.expand(shape.ranks, -1).contiguous(), tokens=seen.tokens, capacity=seen.capacity
    )


def _candidates(layer: TunedLayer, cost: Callable[[ExecutionPlan], float]) -> list[Candidate]:
    """Plans with predictions: all of them on one rank, where they are few."""
    if layer.shape.world == 1 and len(layer.plans) <= _FEW:
        return [Candidate(plan, cost(plan)) for plan in layer.plans]
    return shortlist(layer.plans, cost)
