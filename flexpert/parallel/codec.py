"""Forms in which rows travel: smaller than in memory, at a stated loss.

A codec works row by row: what one row holds never changes another, so a NaN stays in its row. Codecs shorten
fp32 (and fp16 and bf16, where they are longer than the form on the wire); fp64 and integers travel unchanged,
as they are asked for where nothing may be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

SCALE_BYTES = 4
LEAST_SCALE = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
VALUES = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()


class Codec(Protocol):
    """Turns rows into what is sent, and back."""

    name: str

    def encode(self, rows_ND: Tensor) -> Tensor:
        """(N, B) of any dtype, one row for each, to be sent; dtype and B do not depend on N."""
        ...

    def decode(self, wire_NB: Tensor, dtype: torch.dtype, width: int) -> Tensor:
        """The rows (N, width) in `dtype` from what arrived."""
        ...


class _Unchanged:
    name = "none"

    def encode(self, rows_ND: Tensor) -> Tensor:
        return rows_ND

    def decode(self, wire_NB: Tensor, dtype: torch.dtype, width: int) -> Tensor:
        return wire_NB


class _BFloat16:
    """fp32 rounded to bf16, to nearest even: relative error at most 2^-8, infinite beyond 3.39e38."""

    name = "bf16"

    def encode(self, rows_ND: Tensor) -> Tensor:
        return rows_ND.bfloat16() if rows_ND.dtype == torch.float32 else rows_ND

    def decode(self, wire_NB: Tensor, dtype: torch.dtype, width: int) -> Tensor:
        return wire_NB.to(dtype)


class _Float8:
    """e4m3 values and one fp32 scale per row, as D + 4 bytes.

    The scale is the row's largest magnitude / 448, at least the least normal fp32 number. The error of x in a
    row of largest magnitude m is at most 2^-4 |x| + 2^-10 m / 448 (the second term for values that become
    subnormal), and the rounding to `dtype`. A row of zeros stays one. A row with an infinity or NaN arrives
    as NaN as a whole, for it has no scale.
    """

    name = "fp8"

    def encode(self, rows_ND: Tensor) -> Tensor:
        if not _is_short_float(rows_ND.dtype):
            return rows_ND
        values = rows_ND.float()
        scale_N1 = _row_maximum(values).div_(LARGEST).clamp_(min=LEAST_SCALE)
        width = rows_ND.shape[1]
        wire = torch.empty(rows_ND.shape[0], width + SCALE_BYTES, dtype=torch.uint8, device=rows_ND.device)
        wire[:, :width] = (values / scale_N1).to(torch.float8_e4m3fn).view(torch.uint8)
        wire[:, width:] = scale_N1.view(torch.uint8)
        return wire

    def decode(self, wire_NB: Tensor, dtype: torch.dtype, width: int) -> Tensor:
        if not _is_short_float(dtype):
            return wire_NB
        scale_N1 = wire_NB[:, width:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return _float8_values(wire_NB[:, :width]).mul_(scale_N1).to(dtype)


def _float8_values(codes_ND: Tensor) -> Tensor:
    """e4m3 numbers, given as bytes, in fp32."""
    if codes_ND.is_cuda:
        return codes_ND.contiguous().view(torch.float8_e4m3fn).float()
    # On CPUs PyTorch converts them one by one, which takes four times as long as a table.
    return VALUES.index_select(0, codes_ND.flatten().int()).view(codes_ND.shape)


def _is_short_float(dtype: torch.dtype) -> bool:
    return dtype in {torch.float32, torch.bfloat16, torch.float16}


def _row_maximum(values_ND: Tensor) -> Tensor:
    """The largest magnitude of each row (N, 1), NaN where the row has one; 0 for rows of no elements."""
    if values_ND.shape[1] == 0:
        return values_ND.new_zeros(values_ND.shape[0], 1)
    return values_ND.abs().amax(1, keepdim=True)


NONE: Codec = _Unchanged()
BF16: Codec = _BFloat16()
FP8: Codec = _Float8()
CODECS: Mapping[str, Codec] = MappingProxyType({codec.name: codec for codec in (NONE, BF16, FP8)})
