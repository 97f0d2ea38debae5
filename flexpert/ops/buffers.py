"""Rows grouped by expert to buffers of equal size, as ranks are sent them, and back: each other's adjoint.

Letters: N rows, E experts, M rows of all buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import CallFacts
from .cpu import backend as cpu
from .cpu import buffers as native


@dataclass(frozen=True)
class Buffers:
    """The form of buffers that are sent to ranks: by (group, copy, expert of the group).

    Attributes:
        groups: of neighbouring experts; each group's ranks get its buffers.
        copies: of each group's buffers.
        capacity: rows of an expert, all chunks together.
        degree: chunks; chunk i has rows floor(capacity i / degree) and on of every expert.
    """

    groups: int
    copies: int
    capacity: int
    degree: int = 1

    def part(self, chunk: int) -> tuple[int, int]:
        """(first, count) of the rows of each expert that are in a chunk."""
        first = self.capacity * chunk // self.degree
        return first, self.capacity * (chunk + 1) // self.degree - first


def to_buffers(rows_ND: Tensor, counts_E: Tensor, form: Buffers, chunk: int) -> Tensor:
    """Buffers (M, D) of a chunk, 0 where an expert has fewer rows than they have room; no gradient.

    Args:
        rows_ND: grouped by expert.
        counts_E: int64 on the host, rows of each; no more than the capacity, and all rows together.
        form: of the buffers.
        chunk: which.
    """
    first, height = form.part(chunk)
    experts, size = len(counts_E), rows_ND.shape[1]
    if _is_native(rows_ND):
        rows_ND = rows_ND.contiguous()
        buffers_MD = rows_ND.new_empty(experts * form.copies * height, size)
        native.move(
            "fill_buffers", rows_ND, buffers_MD, counts_E, (form.groups, form.copies), (first, height)
        )
        return buffers_MD
    if len(rows_ND) == 0:
        return rows_ND.new_zeros(experts * form.copies * height, size)
    place_En = torch.arange(first, first + height, device=counts_E.device).expand(experts, -1)
    row_En = (counts_E.cumsum(0) - counts_E)[:, None] + place_En
    row_En = row_En.clamp_(max=len(rows_ND) - 1).to(rows_ND.device)
    absent_En = (place_En >= counts_E[:, None]).to(rows_ND.device)
    buffers = rows_ND[row_En].masked_fill_(absent_En[:, :, None], 0)
    buffers = buffers.view(form.groups, 1, -1, size).expand(-1, form.copies, -1, -1)
    return buffers.reshape(-1, size)


def from_buffers(chunks: Sequence[Tensor], counts_E: Tensor, form: Buffers) -> Tensor:
    """Rows (N, D) out of the buffers of all chunks, copies summed; no gradient."""
    size, total = chunks[0].shape[1], int(counts_E.sum())
    if _is_native(chunks[0]):
        rows_ND = chunks[0].new_empty(total, size)
        for chunk, buffers_MD in enumerate(chunks):
            shape, part = (form.groups, form.copies), form.part(chunk)
            native.move("read_buffers", rows_ND, buffers_MD.contiguous(), counts_E, shape, part)
        return rows_ND
    parts = []
    for buffers_MD in chunks:
        of_copies = buffers_MD.view(form.groups, form.copies, -1, size)
        summed = of_copies.squeeze(1) if form.copies == 1 else of_copies.sum(1)
        parts.append(summed.reshape(len(counts_E), -1, size))
    present_EC = torch.arange(form.capacity, device=counts_E.device) < counts_E[:, None]
    return torch.cat(parts, 1)[present_EC.to(parts[0].device)]


def _is_native(rows: Tensor) -> bool:
    return (
        rows.is_cpu and cpu.verify(CallFacts(operator="gather_rows", device="cpu", dtype=rows.dtype)) is None
    )
