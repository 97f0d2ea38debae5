"""What chooses the plan of a call where it is left open; `flexpert.tune.Tuner` is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from flexpert.core.plan import ExecutionPlan


class PlanChooser(Protocol):
    """Chooses the plans of layers' calls; the same one on every rank, whatever the rank's own rows are."""

    def plan_for(self, name: str, counts: Sequence[int], capacity: int | None, tokens: int) -> ExecutionPlan:
        """The plan of a call that is about to run, also of one that is repeated in backward.

        Args:
            name: of the layer's experts.
            counts: this rank's rows for each expert.
            capacity: rows of an expert's buffer; None where the router has no capacity.
            tokens: of this rank.
        """
