"""Random numbers that depend on what they are for, not on where or in which order they are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn


def draw_base() -> int:
    """One base number from the global generator; every layer draws its own at construction."""
    return int(torch.randint(2**62, (), device="cpu"))


def derive_seed(base: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose, from a base number and the names of the purpose."""
    text = "/".join(str(name) for name in (base, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def draw_uniform(target: Tensor, generator: torch.Generator, bound: float) -> None:
    """Fill with uniform values in -bound..bound."""
    target.uniform_(-bound, bound, generator=generator)


def draw_normal(target: Tensor, generator: torch.Generator, std: float = 1.0) -> None:
    """Fill with normal values."""
    target.normal_(0, std, generator=generator)


def draw_trunc_normal(target: Tensor, generator: torch.Generator, std: float) -> None:
    """Fill with normal values cut at two standard deviations."""
    nn.init.trunc_normal_(target, std=std, a=-2 * std, b=2 * std, generator=generator)


@torch.no_grad()
def fill_per_expert(
    w_E: Tensor, base: int, name: str, draw: Callable[[Tensor, torch.Generator], None]
) -> None:
    """Fill the parameter of each expert from a generator of its own.

    Args:
        w_E: (E, ...), changed in place; a meta tensor is left alone.
        base: the layer's base number (`draw_base`).
        name: the parameter's name.
        draw: fills one expert's CPU tensor in place from the given generator.
    """
    if w_E.is_meta:
        return
    for expert, target in enumerate(w_E):
        generator = torch.Generator().manual_seed(derive_seed(base, expert, name))
        whole = torch.empty(target.shape, dtype=torch.float32, device="cpu")
        draw(whole, generator)
        target.copy_(whole)
