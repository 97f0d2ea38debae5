"""Noise that is a hash of counters, in one call where the native library is there and nobody watches."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import CallFacts
from .cpu import backend as cpu
from .cpu import noise
from .watched import is_unwatched

_FACTS = CallFacts(operator="assign", device="cpu", dtype=torch.int64)  # integers, as counters are


def hashed_uniform(key: Tensor, counter: Tensor) -> Tensor | None:
    """What `flexpert.routers.noise.uniform` computes, bit for bit; None where PyTorch's operators have to."""
    if not is_unwatched((counter, key)) or cpu.verify(_FACTS) is not None:
        return None
    if counter.dtype != torch.int64 or key.dtype != torch.int64 or key.dim():
        return None
    return noise.uniform(key, counter)
