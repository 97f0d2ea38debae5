"""A bank of several groups: unlike experts side by side under one router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from flexpert.core.errors import ConfigError
from flexpert.core.routing import Routing

from .bank import ExpertBank, ExpertBatch


class MixedExperts(ExpertBank):
    """Groups of experts; group i takes the slots after those of group i - 1.

    Parameters are named `<group>.<parameter>`.

    Args:
        groups: name to bank, in order of slots; all of one model_dim and output_dim.
    """

    def __init__(self, groups: Mapping[str, ExpertBank]) -> None:
        if not groups:
            raise ConfigError("groups is empty: give at least one group of experts")
        shapes = {(g.model_dim, g.output_dim) for g in groups.values()}
        if len(shapes) > 1:
            raise ConfigError(f"groups differ in (model_dim, output_dim): {sorted(shapes)}; they must agree")
        (model_dim, output_dim) = shapes.pop()
        total = sum(g.num_experts for g in groups.values())
        super().__init__(num_experts=total, model_dim=model_dim, output_dim=output_dim)
        self.starts: dict[str, int] = {}  # first slot of each group
        start = 0
        for name, group in groups.items():
            if not name.isidentifier() or hasattr(self, name):
                raise ConfigError(f"expert group {name!r}: its label names a submodule; choose another")
            self.add_module(name, group)
            self.starts[name] = start
            start += group.num_experts
        members = list(groups.values())
        self.remote = any(g.remote for g in members)
        self.sliceable = all(g.sliceable or not g.remote for g in members)
        self.row_independent = all(g.row_independent for g in members)
        self.has_fused = all(g.has_fused for g in members)

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Results (N, O): the sum of the groups', each of which is 0 in the others' rows."""
        results = [
            group(
                ExpertBatch(
                    rows_ND=batch.rows_ND,
                    counts_E=batch.counts_E,
                    unit_N=batch.unit_N,
                    slot_E=self._slots(name, batch.counts_E, batch.slot_E),
                    payload=batch.payload,
                )
            )
            for name, group in self._members()
        ]
        return sum(results[1:], results[0])

    def fused(self, x_TD: Tensor, routing: Routing, slot_E: Tensor | None = None) -> Tensor:
        """See `ExpertBank.fused`."""
        counts_E = routing.counts_E
        results = [
            group.fused(x_TD, routing, self._slots(name, counts_E, slot_E)) for name, group in self._members()
        ]
        return sum(results[1:], results[0])

    def groups(self) -> dict[str, ExpertBank]:
        """The groups by name, in order of slots."""
        return dict(self._members())

    def params_of_experts(self) -> list[int]:
        """Parameters of each expert, group by group."""
        return [count for _, group in self._members() for count in group.params_of_experts()]

    def flops_of_experts(self) -> list[int]:
        """Floating-point operations per row of each expert, group by group."""
        return [count for _, group in self._members() for count in group.flops_of_experts()]

    def _members(self) -> list[tuple[str, ExpertBank]]:
        return [(name, self.get_submodule(name)) for name in self.starts]  # type: ignore[misc]

    def _slots(self, name: str, counts_E: Tensor, slot_E: Tensor | None) -> Tensor:
        """The place of each logical expert in the group; -1 for those of other groups and banks."""
        if slot_E is None:
            slot_E = torch.arange(counts_E.shape[0], device=counts_E.device)
        start = self.starts[name]
        count = cast("ExpertBank", self.get_submodule(name)).num_experts
        return (slot_E - start).where((slot_E >= start) & (slot_E < start + count), -1)
