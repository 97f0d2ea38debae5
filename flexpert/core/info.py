"""What a call of a layer did besides its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .routing import AnyRouting
from .stats import RoutingStats


@dataclass(frozen=True, kw_only=True)
class MoEInfo:
    """What a call did besides its output.

    Attributes:
        losses: the layer's loss terms by name, scalars with gradient, unweighted; see `flexpert.losses`.
        stats: load, drops and entropy.
        routing: who computed what.
    """

    losses: Mapping[str, Tensor]
    stats: RoutingStats
    routing: AnyRouting
