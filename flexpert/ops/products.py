"""Matrix products over the rows of one expert, in the forms that are fast on CPUs.

In half precision oneDNN builds a kernel for every new shape, which takes longer than most of these products:
so the number of rows is rounded up to one of few.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_TILE = 32


def padded(count: int, dtype: torch.dtype) -> int:
    """The number of rows to compute for `count`: itself, or rounded up in half precision."""
    if dtype.itemsize != 2:
        return count
    return -(-count // ROW_TILE) * ROW_TILE if count > ROW_TILE else 1 << (count - 1).bit_length()


def slack(dtype: torch.dtype) -> int:
    """Rows a buffer needs past its last one: for a padded last segment, and one more rounding (`waves`)."""
    return 2 * (ROW_TILE - 1) if dtype.itemsize == 2 else 0


def segments(counts_E: Tensor, slot_E: Tensor | None, absent: bool = False) -> Iterator[tuple[int, int, int]]:
    """(slot, start, stop) of every expert that has rows; with `absent`, also of those in no slot (-1).

    Reads the counts on the host.
    """
    counts = counts_E.tolist()
    slots = range(len(counts)) if slot_E is None else slot_E.tolist()
    stop = 0
    for slot, count in zip(slots, counts, strict=True):
        start, stop = stop, stop + count
        if count and (absent or slot >= 0):
            yield slot, start, stop


def pad_rows(rows_ND: Tensor) -> Tensor:
    """The rows, followed by zeros up to the number to compute."""
    spare = padded(len(rows_ND), rows_ND.dtype) - len(rows_ND)
    return F.pad(rows_ND, (0, 0, 0, spare)) if spare else rows_ND


def turning_pays(size: int, w1_FD: Tensor, w2_OF: Tensor) -> bool:
    """Whether W x^T is faster than x W^T for an expert's two products.

    oneDNN then does not re-order the weights, but the result has to be transposed, at about eight times the
    cost per number.
    """
    return w1_FD.dtype.itemsize == 2 and 8 * size * len(w2_OF) <= w1_FD.numel() + w2_OF.numel()


def row_product(
    a_NK: Tensor,
    b_KM: Tensor,
    bias_M: Tensor | None = None,
    out: Tensor | None = None,
    turned: bool = False,
) -> Tensor:
    """a @ b + bias where no row of `a` touches another row's result, whatever it holds.

    The half-precision products of oneDNN (AMX) multiply what lies past the end of a row by zero, which lets
    a NaN of one row into others, unless K fills whole tiles of 32. `turned` computes (b^T a^T)^T.
    """
    if a_NK.dtype.itemsize == 2 and a_NK.shape[1] % 32:
        pad = -a_NK.shape[1] % 32
        a_NK, b_KM = F.pad(a_NK, (0, pad)), F.pad(b_KM, (0, 0, 0, pad))
    if turned:
        y_MN = torch.mm(b_KM.t(), a_NK.t())
        if bias_M is not None:
            y_MN += bias_M[:, None]
        return y_MN.t() if out is None else out.copy_(y_MN.t())
    if bias_M is None:
        return torch.mm(a_NK, b_KM, out=out)
    return torch.addmm(bias_M, a_NK, b_KM, out=out)


def outer_product(a_NM: Tensor, b_NK: Tensor, out_MK: Tensor, accumulate: bool) -> None:
    """out = a^T @ b, or out += a^T @ b."""
    if accumulate:
        out_MK.addmm_(a_NM.t(), b_NK)
    else:
        torch.mm(a_NM.t(), b_NK, out=out_MK)


def is_transposed(w: Tensor) -> bool:
    """Whether each matrix of a stack lies transposed in memory, whose gradient then does so as well."""
    return w.mT.is_contiguous() and not w.is_contiguous()
