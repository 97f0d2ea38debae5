"""Large buffers whose pages are used again: writing a fresh page costs more than the product that fills it.

The system hands out fresh memory at a few GB/s, less than a kernel writes, and the C library gives blocks of
32 MiB and more back at once. So such buffers are mapped here, in huge pages, and a block whose tensor is gone
waits for the next one of its size: the gradients of one step lie where those of the step before did. Waiting
blocks are marked free for the system, which takes them when memory is short.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref

import torch
from torch import Tensor

PAGE = 1 << 21
SMALLEST = 32 << 20
WASTE = 1.25  # a waiting block may be larger than asked for by this factor

_idle: list[mmap.mmap] = []
_enabled = sys.platform.startswith("linux")


def _give_back(block: mmap.mmap) -> None:
    block.madvise(mmap.MADV_FREE)
    _idle.append(block)


def _waiting(size: int) -> mmap.mmap | None:
    """A waiting block for `size` bytes, the smallest that will do."""
    fitting = [block for block in _idle if size <= len(block) <= size * WASTE]
    for block in sorted(fitting, key=len):
        try:
            _idle.remove(block)  # another thread may have been faster
        except ValueError:
            continue
        return block
    return None


def _map(size: int) -> mmap.mmap:
    """A new block. Those that wait are dropped first: together they never hold more than was in use."""
    _idle.clear()
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised contiguous tensor of `like`'s dtype and device."""
    count = torch.Size(shape).numel()
    size = count * like.dtype.itemsize
    if not _enabled or like.device.type != "cpu" or size < SMALLEST:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    whole = -(-size // PAGE) * PAGE
    block = _waiting(whole) or _map(whole)
    view = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(view, _give_back, block).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=count).view(shape)
