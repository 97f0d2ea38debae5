"""Whether tensors fit a collective: what is refused before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexpert.core.errors import InputError


def check_pair(operation: str, output: Tensor, source: Tensor) -> None:
    """Refuse an output that rows of `source` cannot be written to.

    Raises:
        InputError: dtype, device or rows differ, or the output is not contiguous.
    """
    if output.dtype != source.dtype or output.device != source.device:
        raise InputError(
            f"{operation}: output is {output.dtype} on {output.device}, input {source.dtype} "
            f"on {source.device}"
        )
    if output.shape[1:] != source.shape[1:]:
        raise InputError(
            f"{operation}: output has rows {tuple(output.shape[1:])}, input {tuple(source.shape[1:])}"
        )
    if not output.is_contiguous():
        raise InputError(f"{operation}: output is written in place and must be contiguous")


def check_rows(operation: str, large: Tensor, small: Tensor, size: int) -> None:
    """Refuse what is not `size` times the rows of `small`.

    Raises:
        InputError: with both shapes.
    """
    if small.dim() == 0 or large.shape != (size * small.shape[0], *small.shape[1:]):
        raise InputError(
            f"{operation}: {size} times {tuple(small.shape)} on the first dimension expected, "
            f"got {tuple(large.shape)}"
        )


def check_reducible(operation: str, tensor: Tensor, op: str) -> None:
    """Refuse a reduction that does not exist for the dtype.

    Raises:
        InputError: with the remedy.
    """
    if tensor.element_size() == 1 and tensor.is_floating_point():
        raise InputError(f"{operation}: {tensor.dtype} cannot be summed or compared; convert it before")
    if op == "sum" and tensor.dtype == torch.bool:  # gloo would add the bytes and leave a bool of 2
        raise InputError(f"{operation}: a sum of bools is none; use op='max', or convert to an integer dtype")
    if op == "avg" and not tensor.is_floating_point():
        raise InputError(f"{operation}: op='avg' of {tensor.dtype}; use 'sum', or convert it before")


def rows_by_position(side: str, tensor: Tensor, splits: Sequence[int] | None, size: int) -> list[int]:
    """Rows of `tensor` for each of `size` positions: `splits`, or equal parts.

    Raises:
        InputError: they are not those of the tensor.
    """
    rows = tensor.shape[0] if tensor.dim() else 0
    if splits is None:
        if rows % size:
            raise InputError(f"all_to_all: {rows} rows of {side} for {size} ranks; pass {side}_splits")
        return [rows // size] * size
    splits = list(splits)
    if len(splits) != size or sum(splits) != rows:
        raise InputError(f"all_to_all: {side}_splits={splits} for {size} ranks and {rows} rows of {side}")
    return splits
