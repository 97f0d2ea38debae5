"""What every bank of experts is, and the batch it computes.

Letters: N rows, D model_dim, O output_dim, E logical experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flexpert import ops
from flexpert.core.autocast import is_autocast_enabled
from flexpert.core.config import require_int
from flexpert.core.layout import ParamLayout, Piece
from flexpert.core.routing import Routing
from flexpert.core.seeding import Initial


@dataclass(frozen=True, kw_only=True)
class ExpertBatch:
    """Rows for experts, grouped by expert.

    Attributes:
        rows_ND: the inputs; rows past `counts_E.sum()` are never read.
        counts_E: int64, rows of each logical expert.
        unit_N: int64, the unit of each row; None for soft routing, whose rows are mixtures.
        slot_E: int64, the place of each logical expert in the bank that is called; -1: not in this bank,
            whose result is then 0 in these rows. None: expert e is at place e.
        payload: named tensors of N rows that travel along (positions, side inputs).
    """

    rows_ND: Tensor
    counts_E: Tensor
    unit_N: Tensor | None
    slot_E: Tensor | None = None
    payload: Mapping[str, Tensor] = field(default_factory=dict)


class ExpertBank(nn.Module):
    """Experts in slots 0..num_experts-1; subclasses define `forward`.

    Args:
        num_experts: slots of this bank.
        model_dim: D of a row.
        output_dim: O of a result.

    Attributes:
        remote: takes part in all-to-all and capacity; False for experts so cheap that they run where the
            token is.
        sliceable: the result is a sum over slices of the hidden dimension.
        row_independent: a row's result depends on that row alone.
        has_fused: `fused` may be called.
        initial: what parameters begin with, by name; with it a bank may be built on the meta device and laid
            out over ranks, each of which then draws its own experts only.
    """

    remote: bool = True
    sliceable: bool = False
    row_independent: bool = True
    has_fused: bool = False

    def __init__(self, *, num_experts: int, model_dim: int, output_dim: int) -> None:
        super().__init__()
        for name, value in (
            ("num_experts", num_experts),
            ("model_dim", model_dim),
            ("output_dim", output_dim),
        ):
            require_int(name, value, least=1)
        self.num_experts, self.model_dim, self.output_dim = num_experts, model_dim, output_dim
        self.initial: dict[str, Initial] = {}

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Results (N, O) of the rows; 0 past the real rows and for experts of other banks."""
        raise TypeError(f"{type(self).__name__} must define forward(batch) -> rows")

    def fused(self, x_TD: Tensor, routing: Routing, slot_E: Tensor | None = None) -> Tensor:
        """Gather, experts and weighted sum in one: (T, O) in x's dtype; only where `has_fused`."""
        raise TypeError(f"{type(self).__name__} has no fused path")

    def routed(self, x_TD: Tensor, choice: ops.TokenChoice) -> Tensor | None:
        """What `fused` gives for the routing of `choice`, in x's dtype; None where no operator has both."""
        return None

    def padded(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """As `fused`, by way of buffers of equal size for every expert, where the bank has such a way."""
        return self.fused(x_TD, routing)

    def kernels(self, dtype: torch.dtype) -> list[str]:
        """What a plan's `kernel` may name for rows of a dtype, "auto" first: all that differs in speed."""
        return ["auto"]

    def pads(self, dtype: torch.dtype) -> bool:
        """Whether `padded` is another way than `fused` for rows of a dtype."""
        return False

    def rows(self, x_RD: Tensor, unit_N: Tensor, counts_E: Tensor, slot_E: Tensor | None = None) -> Tensor:
        """Results (R, O) in place: row unit_N[i] of x is computed by the expert that row i belongs to.

        Args:
            x_RD: rows in any order; none is named twice.
            unit_N: int64, rows grouped by expert.
            counts_E: int64, rows of each expert.
            slot_E: as in `ExpertBatch`.
        """
        rows_ND = ops.gather_rows(x_RD, unit_N, counts_E)
        y_NO = self(ExpertBatch(rows_ND=rows_ND, counts_E=counts_E, unit_N=None, slot_E=slot_E))
        return ops.scatter_combine(y_NO, unit_N, None, counts_E, x_RD.shape[0], y_NO.dtype)

    def layout(self) -> dict[str, ParamLayout]:
        """How each parameter is cut over ranks; those left out are whole on every rank, as dense ones are."""
        return {}

    def hold(self, experts: range) -> bool:
        """Bring tensors that are not stacked into the stacked form of `layout`, for these experts alone.

        Called once, before the bank is laid out over ranks. Returns whether there were any: the stacked
        tensors then have the rows of these experts only.
        """
        return False

    def pieces(self) -> dict[str, Piece]:
        """After `hold`: where what had a name in the bank's state dict before is now."""
        return {}

    def groups(self) -> dict[str, ExpertBank]:
        """The banks this one is made of, by name, in order of slots; itself as "" where it is one."""
        return {"": self}

    def params_of_experts(self) -> list[int]:
        """Parameters of each expert."""
        return [sum(p.numel() for p in self.parameters()) // self.num_experts] * self.num_experts

    def flops_of_experts(self) -> list[int]:
        """Floating-point operations of each expert's matrix products per row."""
        return [0] * self.num_experts


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype experts compute in: autocast's where it is on and x is not fp64, else that of x."""
    if is_autocast_enabled(x.device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in that dtype; None stays None."""
    return None if tensor is None else tensor.to(dtype)


def with_zero_gradients(y: Tensor, unused: Iterable[Tensor]) -> Tensor:
    """y, whose backward gives zeros in place of None to tensors that took no part.

    An optimiser treats the two differently, so that an expert without rows would go another way than in a
    bank whose experts are computed in one operator, or on several ranks.
    """
    if not torch.is_grad_enabled():
        return y
    empty = [tensor.flatten()[:0] for tensor in unused if tensor.requires_grad]
    return y + torch.cat(empty).sum().to(y.dtype) if empty else y


def slots_of_rows(counts_E: Tensor, slot_E: Tensor | None, num_rows: int) -> Tensor:
    """int64 (N,): the slot of each row's expert in the bank; -1 past the real rows and for other banks."""
    if slot_E is None:
        slot_E = torch.arange(counts_E.shape[0], device=counts_E.device)
    rows_N = torch.arange(num_rows, device=counts_E.device)
    expert_N = torch.searchsorted(counts_E.cumsum(0), rows_N, right=True)
    return torch.cat([slot_E, slot_E.new_full((1,), -1)])[expert_N]


def weighted_sum(rows_NO: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """The plain weighted sum of a routing's rows, (T, O)."""
    return ops.scatter_combine(
        rows_NO, routing.unit_N, routing.weight_N, routing.counts_E, routing.num_units, dtype
    )
