"""Counter-based noise: a hash of (key, counter), so that a draw depends on nothing but its key and place.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.errors import InputError
from flexpert.core.recomputing import recomputing
from flexpert.ops.hashed import hashed_uniform

_STEP = -7046029254386353131  # 2^64 / golden ratio, as signed 64 bit
_MIX = (-4658895280553007687, -7723592293110705685)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical: torch shifts signed integers arithmetically


def mix(z: Tensor) -> Tensor:
    """Hash int64 values to int64 values, each bit of the input reaching each bit of the output."""
    z = z * _STEP
    z = (z ^ _shift_right(z, 30)) * _MIX[0]
    z = (z ^ _shift_right(z, 27)) * _MIX[1]
    return z ^ _shift_right(z, 31)


def uniform(key: Tensor, counter: Tensor) -> Tensor:
    """fp32 values in (0, 1), one per counter; 23 bits, as n + 0.5 of 24 bits would round up to 1."""
    if (values := hashed_uniform(key, counter)) is not None:
        return values
    return (_shift_right(mix(mix(counter) + key), 41).float() + 0.5) * 2.0**-23


def normal(key: Tensor, counter: Tensor) -> Tensor:
    """Standard normal fp32 values, one per counter (Box and Muller)."""
    radius = (-2 * uniform(key, 2 * counter).log()).sqrt()
    return radius * (2 * torch.pi * uniform(key, 2 * counter + 1)).cos()


def call_key(context: RoutingContext, seed: int, device: torch.device) -> Tensor:
    """The int64 key of one call: of (seed, step) where there is a step, else drawn from the generator.

    Raises:
        InputError: a recomputation that would have to draw from the caller's generator a second time.
    """
    if context.step is not None:
        return mix(torch.full((), seed, dtype=torch.int64, device=device) + context.step)
    if context.generator is not None and recomputing():
        raise InputError(
            "activation checkpointing cannot repeat the noise of a generator; give RoutingContext(step=...)"
        )
    source = context.generator.device if context.generator is not None else "cpu"
    return torch.randint(2**62, (), generator=context.generator, device=source).to(device)


def counters(rows: int, columns: int, device: torch.device, first: int = 0) -> Tensor:
    """int64 (rows, columns): a different counter for each place; those of the rows from `first` on."""
    return torch.arange(rows * columns, device=device).view(rows, columns) + first * columns
