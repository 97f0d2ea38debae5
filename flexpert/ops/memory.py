"""Large buffers on huge pages: the first write to a fresh buffer costs as much as the product that does it.

A kernel that hands out memory in pages of 4 KiB needs about a microsecond for each; asking Linux for pages of
2 MiB is a hint that it may ignore.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor

_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return madvise


_madvise = _find_madvise()


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised contiguous tensor of `like`'s dtype and device."""
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    if _madvise is not None and tensor.device.type == "cpu" and tensor.nbytes >= 2 * _PAGE:
        first = -(-tensor.data_ptr() // _PAGE) * _PAGE
        last = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        _madvise(first, last - first, _MADV_HUGEPAGE)
    return tensor
