"""How a bank's tensors may be cut over ranks; declared by the bank, obeyed by every parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ParamLayout:
    """A parameter or buffer stacked over a bank's experts, (E, ...): cut on dimension 0, perhaps on another.

    Attributes:
        slice_dim: the dimension that is cut where ranks share an expert (its hidden dimension); None: whole
            on each of these ranks.
        once: of a parameter that is whole: it enters the sum over slices once, so that the first slice uses
            it and the others use 0 (an output bias). False: every slice computes with it.
    """

    slice_dim: int | None
    once: bool = False


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Where a tensor of one expert lies in a stacked tensor (E, P), whose row e has all there is of expert e.

    Attributes:
        stacked: the name of the stacked tensor in the bank.
        expert: the row.
        start: the first element in the row.
        shape: of the expert's tensor.
    """

    stacked: str
    expert: int
    start: int
    shape: torch.Size

    def of(self, row_P: Tensor) -> Tensor:
        """The expert's tensor, a view of the row."""
        return row_P[self.start : self.start + self.shape.numel()].view(self.shape)
