"""Tensors of unlike experts under the names of one process: out of the stacked ones, and back into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flexpert.core.errors import CheckpointError
from flexpert.core.layout import Piece


class Pieces:
    """Where the tensors of a model's unlike experts are, see `ExpertBank.hold`; nothing in other models.

    Args:
        model: after `parallelize`, or any.

    Attributes:
        places: from names in the state dict of the unparallelised model to pieces, whose `stacked` is the
            name in this model's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.places: dict[str, Piece] = {}
        self._within: dict[str, list[str]] = {}
        for path, bank in model.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            for name, piece in _pieces(bank).items():
                stacked = f"{prefix}{piece.stacked}"
                self.places[f"{prefix}{name}"] = dataclasses.replace(piece, stacked=stacked)
                self._within.setdefault(stacked, []).append(f"{prefix}{name}")

    def within(self, stacked: str) -> list[str]:
        """The names of what is in a stacked tensor; none where it is none."""
        return self._within.get(stacked, [])

    def original_names(self, names: Iterable[str]) -> list[str]:
        """The names of this model's state dict as the unparallelised model has them, in its order."""
        found: dict[str, None] = {}
        for name in names:
            own = self.within(name)
            bank = self.places[own[0]].stacked.rpartition(".")[0] if own else None
            found |= dict.fromkeys([name] if bank is None else self._of_bank(bank))
        return list(found)

    def apart(self, stacked: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of a stacked tensor, or of one like it, by name: views."""
        names = self.within(stacked)
        held, local = _rows(tensor) if names else (range(0), tensor)
        for name in names:
            if (piece := self.places[name]).expert in held:
                yield name, piece.of(local[piece.expert - held.start])

    def join(self, stacked: str, like: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """A tensor laid out as `like`, of whole ones by name, of which this rank needs those it holds.

        Raises:
            CheckpointError: one is missing or has another shape.
        """
        whole = torch.zeros_like(like, requires_grad=False, dtype=_dtype(given, like.dtype))
        faults = self._faults(stacked, given)
        if faults:
            raise CheckpointError(f"the tensors do not fit {stacked}: {'; '.join(faults)}")
        for name, target in self.apart(stacked, whole):
            target.copy_(given[name])
        return whole

    def _faults(self, stacked: str, given: Mapping[str, Tensor]) -> list[str]:
        found = []
        for name in self.within(stacked):
            if name not in given:
                found.append(f"{name} is missing")
            elif given[name].shape != self.places[name].shape:
                shapes = list(given[name].shape), list(self.places[name].shape)
                found.append(f"{name} has shape {shapes[0]} instead of {shapes[1]}")
        return found

    def _of_bank(self, bank: str) -> list[str]:
        return [name for name, piece in self.places.items() if piece.stacked.rpartition(".")[0] == bank]


def _pieces(bank: Any) -> dict[str, Piece]:
    return bank.pieces() if hasattr(bank, "hold") and hasattr(bank, "pieces") else {}


def _rows(tensor: Tensor) -> tuple[range, Tensor]:
    """The experts whose rows this rank has, and these rows."""
    if not isinstance(tensor, DTensor):
        return range(tensor.shape[0]), tensor
    local, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return range(offsets[0], offsets[0] + local[0]), tensor.to_local()


def _dtype(given: Mapping[str, Tensor], default: torch.dtype) -> torch.dtype:
    return next((tensor.dtype for tensor in given.values()), default)
