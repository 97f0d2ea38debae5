"""The last stage on several ranks: the best plan with each other kernel that its layer can run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .candidate import Candidate
from .limits import Limits
from .race import Race
from .standing import Standing


class KernelRace(Race):
    """A race that the usual kernel wins unless another one is faster beyond the interval of confidence.

    Arguments and attributes are those of `Search`.
    """

    @classmethod
    def of(cls, usual: Candidate, kernels: Sequence[str], limits: Limits) -> KernelRace:
        """That of a plan.

        Args:
            usual: the plan with the usual kernel.
            kernels: the others.
            limits: of this race alone.
        """
        plans = [dataclasses.replace(usual.plan, kernel=kernel) for kernel in kernels]
        # No model tells kernels apart before they ran.
        candidates = [usual, *(Candidate(plan, usual.predicted) for plan in plans)]
        return cls(candidates, limits, first=usual.plan)

    def lost(self) -> set[str]:
        """Kernels that are known to bring nothing beside the best one."""
        return {plan.kernel for plan in self.out()}

    def _best(self, standing: Standing) -> int:
        return standing.leader
