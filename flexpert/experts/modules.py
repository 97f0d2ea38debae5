"""Unlike experts: any modules in one bank."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flexpert.core.errors import ConfigError, InputError
from flexpert.core.layout import ParamLayout, Piece

from .bank import ExpertBank, ExpertBatch, with_zero_gradients
from .pieces import BUFFERS, PASSING, by_expert, clear, find_pieces, stack, views


class ModuleExperts(ExpertBank):
    """A list of modules, each mapping (n, D) rows to (n, O); they may differ in kind and size.

    The module of an expert without rows is not called; its parameters then have a gradient of zeros.

    Over ranks each one holds the tensors of its experts alone, in rows of stacked ones: see `hold`.

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
        self._held: range | None = None  # the experts of this rank, after `hold`
        self._stacked: tuple[str, ...] = ()
        self._pieces: list[list[tuple[str, Piece]]] = []  # of each expert
        self._counted: tuple[list[int], list[int]] | None = None

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Results (N, O) of the rows; see `ExpertBank.forward`. Reads the counts on the host.

        Raises:
            InputError: over ranks, a module writes to its buffers, of which ranks have copies.
        """
        counts = batch.counts_E.tolist()
        slots = range(len(counts)) if batch.slot_E is None else batch.slot_E.tolist()
        call = self._call_stacked() if self._stacked else self._call
        parts, called, start = [], set(), 0
        for slot, count in zip(slots, counts, strict=True):
            rows = batch.rows_ND[start : start + count]
            start += count
            if count:
                parts.append(call(slot, rows) if slot >= 0 else self._zeros(rows, count))
                called.add(slot)
        parts.append(self._zeros(batch.rows_ND, batch.rows_ND.shape[0] - start))
        y_NO = torch.cat([part.to(parts[0].dtype) for part in parts])
        idle = (expert for slot, expert in enumerate(self.experts) if slot not in called)
        return with_zero_gradients(y_NO, (p for expert in idle for p in expert.parameters()))

    def hold(self, experts: range) -> bool:
        """Keep the tensors of these experts alone, as rows of stacked ones; the modules lose theirs.

        Stacked are, by dtype: `matrices_<dtype>` and `vectors_<dtype>` (parameters), `frozen_<dtype>` (those
        that need no gradient now), `buffers_<dtype>` and `passing_<dtype>` (buffers that are not saved).

        Raises:
            ConfigError: experts share a tensor, or a module cannot be called with other tensors.
        """
        pieces = find_pieces(self.experts)
        self._counted = self.params_of_experts(), self.flops_of_experts()
        stacked = stack(self.experts, pieces, experts)
        clear(self.experts)
        self._held, self._stacked = experts, tuple(stacked)
        self._pieces = by_expert(pieces, self.num_experts)
        for name, tensor in stacked.items():
            kind = name.partition("_")[0]
            if kind in (BUFFERS, PASSING):
                self.register_buffer(name, tensor, persistent=kind == BUFFERS)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=kind != "frozen"))
        return True

    def pieces(self) -> dict[str, Piece]:
        """After `hold`: from what was in the state dict to where it is."""
        return {
            f"experts.{number}.{name}": piece
            for number, own in enumerate(self._pieces)
            for name, piece in own
            if not piece.stacked.startswith(PASSING)
        }

    def layout(self) -> dict[str, ParamLayout]:
        """The stacked tensors of `hold`, cut by experts alone."""
        return {name: ParamLayout(slice_dim=None) for name in self._stacked}

    def params_of_experts(self) -> list[int]:
        """Parameters of each module."""
        if self._counted is not None:
            return list(self._counted[0])
        return [sum(p.numel() for p in expert.parameters()) for expert in self.experts]

    def flops_of_experts(self) -> list[int]:
        """2 per weight of each `nn.Linear` inside; other modules are not counted."""
        if self._counted is not None:
            return list(self._counted[1])
        linears = [[m for m in expert.modules() if isinstance(m, nn.Linear)] for expert in self.experts]
        return [sum(2 * m.weight.numel() for m in group) for group in linears]

    def _call(self, slot: int, rows: Tensor) -> Tensor:
        y: Tensor = self.experts[slot](rows)
        return y

    def _call_stacked(self) -> Callable[[int, Tensor], Tensor]:
        """Calls the expert of a row of the stacked tensors, which are those of all experts or of the held."""
        stacked = {name: getattr(self, name) for name in self._stacked}
        rows_of = {name: tensor.unbind() for name, tensor in stacked.items()}
        held = self._held
        assert held is not None, "there are stacked tensors"
        first = 0 if all(len(rows) == self.num_experts for rows in rows_of.values()) else held.start

        def call(slot: int, rows: Tensor) -> Tensor:
            own = views({name: each[slot] for name, each in rows_of.items()}, self._pieces[first + slot])
            before = {name: stacked[name]._version for name in stacked if not stacked[name].is_inference()}
            y: Tensor = functional_call(self.experts[first + slot], own, (rows,))
            if any(stacked[name]._version != version for name, version in before.items()):
                raise InputError(
                    f"expert {first + slot} ({type(self.experts[first + slot]).__name__}) writes to its "
                    f"buffers; over ranks modules may only read them (batch norm: call eval(), or build it "
                    f"with track_running_stats=False)"
                )
            return y

        return call

    def _zeros(self, like: Tensor, count: int) -> Tensor:
        return like.new_zeros(count, self.output_dim)
