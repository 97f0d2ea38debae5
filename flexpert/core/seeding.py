"""Random numbers that depend on what they are for, not on where or in which order they are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

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


class Initial(Protocol):
    """What a tensor begins with.

    Modules keep one for each of their tensors by name, as `initial`, so that a model built on the meta device
    can be given values later, an expert at a time.
    """

    def fill(self, target: Tensor) -> None:
        """Set the whole tensor, in place; a meta tensor is left alone."""

    def of_expert(self, expert: int, shape: Sequence[int]) -> Tensor:
        """The part (...) of one expert in a tensor (E, ...), fp32 on the CPU."""


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float

    @torch.no_grad()
    def fill(self, target: Tensor) -> None:
        """See `Initial`."""
        if not target.is_meta:
            target.fill_(self.value)

    def of_expert(self, expert: int, shape: Sequence[int]) -> Tensor:
        """See `Initial`."""
        return torch.full(tuple(shape), self.value, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Drawn:
    """Random values from a generator of their own.

    Args:
        base: the layer's base number (`draw_base`).
        name: what the values are for, the parameter's name for instance.
        draw: fills a CPU tensor in place from the given generator.
        per_expert: of a tensor (E, ...): each expert's part is drawn from a generator of its own.
    """

    base: int
    name: str
    draw: Callable[[Tensor, torch.Generator], None]
    per_expert: bool = True

    @torch.no_grad()
    def fill(self, target: Tensor) -> None:
        """See `Initial`."""
        if target.is_meta:
            return
        if not self.per_expert:
            target.copy_(self._values(derive_seed(self.base, self.name), target.shape))
            return
        for expert, part in enumerate(target):
            part.copy_(self.of_expert(expert, part.shape))

    def of_expert(self, expert: int, shape: Sequence[int]) -> Tensor:
        """See `Initial`."""
        return self._values(derive_seed(self.base, expert, self.name), shape)

    def _values(self, seed: int, shape: Sequence[int]) -> Tensor:
        values = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
        self.draw(values, torch.Generator().manual_seed(seed))
        return values
