"""Tensors of unlike modules in the rows of a few stacked ones, so that any experts can be cut over ranks.

An expert's tensors of one kind and dtype lie one after the other in its row of a tensor (E, P), where P is
what the largest expert needs. The rest of a row is 0 and stays 0: nothing reads it, so its gradient is 0, and
neither decay nor the moments of an element-wise optimiser move it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flexpert.core.errors import ConfigError
from flexpert.core.layout import Piece

# Matrices apart from vectors, as optimisers decay the former alone. PASSING: buffers that are not saved.
MATRICES, VECTORS, FROZEN, BUFFERS, PASSING = "matrices", "vectors", "frozen", "buffers", "passing"


def find_pieces(experts: nn.ModuleList) -> dict[str, Piece]:
    """From each tensor's name in `experts` to its place; names of one tied tensor have the same place.

    Raises:
        ConfigError: experts share a tensor, or a module that cannot be called with other tensors.
    """
    saved = experts.state_dict(keep_vars=True).keys()
    pieces: dict[str, Piece] = {}
    owners: dict[Tensor, tuple[int, Piece]] = {}
    for number, expert in enumerate(experts):
        check_can_be_called(number, expert)
        used: dict[str, int] = {}
        for name, tensor in named_tensors(expert):
            full = f"{number}.{name}"
            owner, piece = owners.get(tensor, (number, None))
            if owner != number:
                raise ConfigError(
                    f"experts {owner} and {number} share {name!r}; over ranks each expert has tensors of its "
                    f"own: copy the module, or put what is shared outside of the experts"
                )
            if piece is None:
                stacked = f"{_kind(tensor, full in saved)}_{str(tensor.dtype).removeprefix('torch.')}"
                start = used.get(stacked, 0)
                used[stacked] = start + tensor.numel()
                piece = Piece(stacked=stacked, expert=number, start=start, shape=tensor.shape)
                owners[tensor] = number, piece
            pieces[full] = piece
    return pieces


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, those of tied ones under each name, in the order of a state dict."""
    found = []
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                found.append((f"{path}.{name}" if path else name, tensor))
    return found


@torch.no_grad()
def stack(experts: nn.ModuleList, pieces: Mapping[str, Piece], held: range) -> dict[str, Tensor]:
    """The stacked tensors by name, each with the rows of the held experts, on their device."""
    widths: dict[str, int] = {}
    for piece in pieces.values():
        end = piece.start + piece.shape.numel()
        widths[piece.stacked] = max(widths.get(piece.stacked, 1), end)
    tensors = dict(named_tensors(experts))
    like = {piece.stacked: tensors[name] for name, piece in pieces.items()}
    stacked = {name: like[name].new_zeros(len(held), width) for name, width in sorted(widths.items())}
    for name, piece in pieces.items():
        if piece.expert in held and piece.shape.numel():
            piece.of(stacked[piece.stacked][piece.expert - held.start]).copy_(tensors[name])
    return stacked


def clear(experts: nn.ModuleList) -> None:
    """Take the tensors out of the modules, which can then be called by `functional_call` alone."""
    for module in experts.modules():
        for own in (module._parameters, module._buffers):
            own.update(dict.fromkeys(own))


def views(rows: Mapping[str, Tensor], pieces: Sequence[tuple[str, Piece]]) -> dict[str, Tensor]:
    """An expert's tensors by name, views of its rows (P,) of the stacked tensors.

    Rows are split, not indexed: the gradient of a row is then joined from parts instead of summed from rows.
    """
    parts: dict[tuple[str, int], Tensor] = {}
    for stacked, row in rows.items():
        sizes = {piece.start: piece.shape.numel() for _, piece in pieces if piece.stacked == stacked}
        sizes = {start: size for start, size in sorted(sizes.items()) if size}
        split = row.split([*sizes.values(), len(row) - sum(sizes.values())])
        parts |= {(stacked, start): part for start, part in zip(sizes, split, strict=False)}
    return {
        name: parts[piece.stacked, piece.start].view(piece.shape)
        if piece.shape.numel()
        else rows[piece.stacked][:0].view(piece.shape)
        for name, piece in pieces
    }


def by_expert(pieces: Mapping[str, Piece], num_experts: int) -> list[list[tuple[str, Piece]]]:
    """The pieces of each expert, under their names in its module."""
    found: list[list[tuple[str, Piece]]] = [[] for _ in range(num_experts)]
    for name, piece in pieces.items():
        found[piece.expert].append((name.partition(".")[2], piece))
    return found


def check_can_be_called(number: int, expert: nn.Module) -> None:
    """Raise ConfigError for a module that `functional_call` calls with its old tensors."""
    for path, module in expert.named_modules():
        if isinstance(module, nn.RNNBase):
            raise ConfigError(
                f"expert {number}: {path or 'it'} is an {type(module).__name__}, which keeps its weights "
                f"where others cannot take their place; it can be neither stacked nor cut over ranks"
            )


def _kind(tensor: Tensor, saved: bool) -> str:
    if not isinstance(tensor, nn.Parameter):
        return BUFFERS if saved else PASSING
    if not tensor.requires_grad:
        return FROZEN
    return MATRICES if tensor.dim() > 1 else VECTORS
