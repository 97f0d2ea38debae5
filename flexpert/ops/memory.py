"""Large buffers whose pages are used again: writing a fresh page costs more than the product that fills it.

The system hands out fresh memory at a few GB/s, less than a kernel writes, and the C library gives large
blocks back at once. So such buffers are mapped here, in huge pages, and a block whose tensor is gone
waits for the next one of its size: the gradients of one step lie where those of the step before did. No
more wait than were ever in use, and waiting blocks are marked free for the system, which takes them when
memory is short.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref

import torch
from torch import Tensor, nn

PAGE = 1 << 21
SMALLEST = 2 * PAGE
WASTE = 1.25  # a waiting block may be larger than asked for by this factor

_enabled = sys.platform.startswith("linux")


class _Blocks:
    """Those that wait, oldest first.

    They come back whenever a tensor dies, so nothing here takes a lock: each line that changes something is
    one step for other threads, whatever they do between the lines.
    """

    def __init__(self) -> None:
        self.waiting: list[mmap.mmap] = []
        self.live = self.most_live = 0  # bytes in use, now and at most

    def take(self, size: int) -> mmap.mmap:
        """A block of at least `size` bytes: the smallest waiting one that will do, else a new one."""
        block = self._find(size) or self._map(size)
        size = len(block)
        self.live += size
        self.most_live = max(self.most_live, self.live)
        return block

    def give_back(self, block: mmap.mmap) -> None:
        """Let a block wait; the oldest go where too many do."""
        size = len(block)
        self.live -= size
        block.madvise(mmap.MADV_FREE)
        self.waiting.append(block)
        while sum(map(len, self.waiting)) > self.most_live:
            del self.waiting[:1]

    def _find(self, size: int) -> mmap.mmap | None:
        fitting = [block for block in self.waiting if size <= len(block) <= size * WASTE]
        for block in sorted(fitting, key=len):
            try:
                self.waiting.remove(block)  # another thread may have been faster
            except ValueError:
                continue
            return block
        return None

    @staticmethod
    def _map(size: int) -> mmap.mmap:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
        return block


_blocks = _Blocks()


_COLLAPSE = 25  # of madvise: huge pages at once, not when the system gets round to it (Linux 6.1)
_seen: dict[int, int] = {}  # bytes at an address


def prefer_huge_pages(tensor: Tensor) -> None:
    """Move a tensor that is read over and over, such as a weight, onto huge pages: a hint, taken once.

    A read of 200 MB in pages of 4 KiB stops at each for its address. Moving takes about a millisecond per MB.
    """
    if not _enabled or type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return
    address = tensor.data_ptr()
    if tensor.nbytes < SMALLEST or _seen.get(address) == tensor.nbytes:
        return
    _seen[address] = tensor.nbytes
    first, last = -(-address // PAGE) * PAGE, (address + tensor.nbytes) // PAGE * PAGE
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    madvise(first, last - first, _COLLAPSE)  # where it fails, pages stay as they are


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised contiguous tensor of `like`'s dtype and device."""
    count = torch.Size(shape).numel()
    size = count * like.dtype.itemsize
    if not _enabled or like.device.type != "cpu" or size < SMALLEST:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    whole = -(-size // PAGE) * PAGE
    block = _blocks.take(whole)
    view = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(view, _blocks.give_back, block).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=count).view(shape)
