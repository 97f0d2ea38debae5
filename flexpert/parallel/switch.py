"""Switching r: which parameters a rank gathers for a call, and which ranks its rows go to.

Letters: E experts of a group, e of them on one rank, S slices, X expert ranks, P = X S ranks that exchange
rows.
With r >= 1 the S slices of an expert form r blocks of S / r neighbours. A block gathers its slices, so that
each of its members computes one r-th of the hidden dimension; the blocks together compute all of it, and the
sources are dealt out over the members.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.layout import ParamLayout

from .gathering import Part, gathered
from .layout import Bank, tensors_of
from .mesh import ExpertMesh


def block_size(mesh: ExpertMesh, r: int) -> int:
    """S / r: neighbouring slices that gather their parameters; S for r = 0."""
    return mesh.slices // max(r, 1)


class Cut:
    """How the tensors of one bank are cut on a mesh, worked out once, as small calls have no time for it.

    Args:
        bank: as it is laid out.
        mesh: the ranks.

    Attributes:
        layouts: of the bank.
    """

    def __init__(self, bank: Bank, mesh: ExpertMesh) -> None:
        self.layouts = dict(bank.layout())
        self._mesh = mesh
        self._parts: dict[int, dict[str, Part]] = {}

    def parts(self, r: int) -> dict[str, Part]:
        """What is done with each cut tensor under r."""
        if r not in self._parts:
            self._parts[r] = {name: _part(layout, self._mesh, r) for name, layout in self.layouts.items()}
        return self._parts[r]


def weights_for(
    bank: Bank, cut: Cut, r: int, dtype: torch.dtype, layer: str = "experts"
) -> dict[str, Tensor]:
    """The parameters that this rank computes with under r, in `dtype`, differentiable, and the buffers.

    Those of its e experts for r >= 1, of all E for r = 0. Their gradients arrive at the bank's own parameters
    as the sum over the replica's ranks, divided so that the mean over the ranks with equal copies is
    (1 / W) * the sum over all W ranks.
    """
    tensors, parts = tensors_of(bank, cut.layouts), cut.parts(r)
    names = [name for name in tensors if name in parts]
    shares = [tensors[name] for name in names]
    wholes = gathered(shares, [parts[name] for name in names], dtype, f"{layer} parameters")
    return {**tensors, **dict(zip(names, wholes, strict=True))}


def _part(layout: ParamLayout, mesh: ExpertMesh, r: int) -> Part:
    size = block_size(mesh, r)
    if layout.slice_dim is None:
        # Added by the first block alone where several compute a part each.
        nothing = layout.once and r > 1 and mesh.slice >= size
        return Part(mesh.column if r == 0 else None, 1, 0, 1.0 / mesh.expert_ranks, nothing)
    return Part(mesh.whole if r == 0 else mesh.blocks[size], size, layout.slice_dim, 1.0 / mesh.whole.size)


def destinations(mesh: ExpertMesh, r: int, source: int) -> list[bool]:
    """For each of the P ranks whether the source at this position sends it the rows of its experts."""
    size = block_size(mesh, r)
    return [(place % mesh.slices) % size == source % size for place in range(mesh.whole.size)]


def even_counts(rows: int, num_experts: int, mesh: ExpertMesh, r: int) -> Tensor:
    """int64 (P, P, e): rows from each rank to each for each expert there, every expert having `rows`."""
    size = mesh.whole.size
    chosen_PP = torch.tensor([destinations(mesh, r, source) for source in range(size)])
    each = num_experts // mesh.expert_ranks
    return (chosen_PP.long() * rows)[:, :, None].expand(size, size, each).contiguous()


def starts_by_rank(counts_E: Tensor, mesh: ExpertMesh) -> Tensor:
    """int64 (P, e): where the rows of each rank's experts begin among rows grouped by expert."""
    starts_E = counts_E.cumsum(0) - counts_E
    starts_XSe = starts_E.view(mesh.expert_ranks, 1, -1).expand(-1, mesh.slices, -1)
    return starts_XSe.reshape(mesh.whole.size, -1)
