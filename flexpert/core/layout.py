"""How a bank's tensors may be cut over ranks; declared by the bank, obeyed by every parallelism."""

from __future__ import annotations

from dataclasses import dataclass


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
