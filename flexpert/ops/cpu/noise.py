"""Native noise: the hash of each counter in one call into the library."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .calls import run
from .threads import num_threads

_UNIFORM = struct.Struct("=5q")  # the fields of UniformCall in csrc/noise.h


def uniform(key: Tensor, counter: Tensor) -> Tensor:
    """fp32 values in (0, 1), of the shape of the int64 counters; the key is an int64 scalar."""
    counter = counter.contiguous()
    values = counter.new_empty(counter.shape, dtype=torch.float32)
    addresses = counter.data_ptr(), values.data_ptr()
    run("uniform", _UNIFORM.pack(counter.numel(), num_threads(), int(key), *addresses))
    return values
