"""Native rows to and from buffers of equal size, each way in one call into the library."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .calls import check, run
from .threads import num_threads

_BUFFERS = struct.Struct("=11q")  # the fields of BuffersCall in csrc/buffers.h


def move(
    name: str,
    rows_ND: Tensor,
    buffers_MD: Tensor,
    counts_E: Tensor,
    shape: tuple[int, int],
    part: tuple[int, int],
) -> None:
    """`fill_buffers` or `read_buffers`: one tensor from the other.

    Args:
        name: of the two.
        rows_ND: contiguous, as many as `counts_E` (int64, contiguous, on the host) counts.
        buffers_MD: contiguous, of the same dtype, fp32 or bf16.
        shape: groups of experts, which divide them, and copies of each.
        part: the first row of each expert, and rows of each buffer.
    """
    (rows, size), experts, (_, height) = rows_ND.shape, len(counts_E), part
    check(name, buffers_MD=(buffers_MD, (experts * shape[1] * height, size), rows_ND.dtype))
    call = _BUFFERS.pack(
        rows, experts, *shape, *part, size, num_threads(),
        rows_ND.data_ptr(), buffers_MD.data_ptr(), counts_E.data_ptr(),
    )  # fmt: skip
    run(name, call, rows_ND.dtype == torch.bfloat16, refusal="counts_E does not add up to the rows")
