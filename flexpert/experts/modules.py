"""Unlike experts: any modules in one bank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flexpert.core.errors import ConfigError

from .bank import ExpertBank, ExpertBatch


class ModuleExperts(ExpertBank):
    """A list of modules, each mapping (n, D) rows to (n, O); they may differ in kind and size.

    The module of an expert without rows is not called.

    Args:
        experts: the modules, in order of their slots.
        model_dim: D.
        output_dim: O; None means D.
        row_independent: False where a module mixes its rows (attention over the rows, batch statistics).
    """

    def __init__(
        self,
        experts: Iterable[nn.Module],
        *,
        model_dim: int,
        output_dim: int | None = None,
        row_independent: bool = True,
    ) -> None:
        modules = nn.ModuleList(experts)
        if not modules:
            raise ConfigError("experts is empty: give at least one module")
        output_dim = model_dim if output_dim is None else output_dim
        super().__init__(num_experts=len(modules), model_dim=model_dim, output_dim=output_dim)
        self.experts = modules
        self.row_independent = row_independent

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Results (N, O) of the rows; see `ExpertBank.forward`. Reads the counts on the host."""
        counts = batch.counts_E.tolist()
        slots = range(len(counts)) if batch.slot_E is None else batch.slot_E.tolist()
        parts, start = [], 0
        for slot, count in zip(slots, counts, strict=True):
            rows = batch.rows_ND[start : start + count]
            start += count
            if count:
                parts.append(self.experts[slot](rows) if slot >= 0 else self._zeros(rows, count))
        parts.append(self._zeros(batch.rows_ND, batch.rows_ND.shape[0] - start))
        return torch.cat([part.to(parts[0].dtype) for part in parts])

    def params_of_experts(self) -> list[int]:
        """Parameters of each module."""
        return [sum(p.numel() for p in expert.parameters()) for expert in self.experts]

    def flops_of_experts(self) -> list[int]:
        """2 per weight of each `nn.Linear` inside; other modules are not counted."""
        linears = [[m for m in expert.modules() if isinstance(m, nn.Linear)] for expert in self.experts]
        return [sum(2 * m.weight.numel() for m in group) for group in linears]

    def _zeros(self, like: Tensor, count: int) -> Tensor:
        return like.new_zeros(count, self.output_dim)
