"""Read the experts of a MoE layer as values, and the use that was made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexpert.core.errors import ConfigError, InputError
from flexpert.core.stats import RoutingStats, merge_stats
from flexpert.experts import DropoutMLPExperts, MLPExperts, SharedExpert
from flexpert.layer import MoE

from .dense import DenseMLP

Stats = Mapping[Any, RoutingStats]


def read_bank(bank: Any, name: str) -> list[DenseMLP]:
    """The experts of a bank of equal MLPs, not copied.

    Raises:
        ConfigError: a bank of another kind.
    """
    if not isinstance(bank, MLPExperts):
        raise ConfigError(
            f"{name} has {type(bank).__name__}; expected a bank of equal experts, 'mlp' or 'glu'"
        )
    weights = bank.weights_in(bank.packed_w1.dtype if bank.is_packed else bank.w1.dtype)
    w1, b1, w2, b2 = (None if tensor is None else tensor.detach() for tensor in weights)
    assert w1 is not None
    assert w2 is not None

    dropout = bank.dropout if isinstance(bank, DropoutMLPExperts) else 0.0

    def of(tensor: Tensor | None, expert: int) -> Tensor | None:
        return None if tensor is None else tensor[expert]

    return [
        DenseMLP(w1=w1[e], b1=of(b1, e), w2=w2[e], b2=of(b2, e), activation=bank.activation, dropout=dropout)
        for e in range(bank.num_experts)
    ]


def read_shared(layer: MoE, name: str) -> DenseMLP | None:
    """The shared expert of a layer; None where it has none.

    Raises:
        ConfigError: one with a gate, or of another kind.
    """
    if layer.shared is None:
        return None
    if not isinstance(layer.shared, SharedExpert) or layer.shared.gate is not None:
        raise ConfigError(
            f"{name} has a shared expert that is gated or of another kind; a dense MLP cannot hold it"
        )
    return dataclasses.replace(read_bank(layer.shared.expert, name)[0], dropout=layer.shared.dropout)


def load_of(name: str, num_experts: int, stats: Stats | None) -> list[float]:
    """Rows that each expert of a layer computed, by statistics such as `routing_scope(model).stats`.

    Args:
        name: of the layer.
        num_experts: E.
        stats: by layer name, or by (layer name, index of the call); calls are added up.

    Raises:
        InputError: there are none of this layer, or they do not fit it.
    """
    calls = [
        value for key, value in (stats or {}).items() if (key[0] if isinstance(key, tuple) else key) == name
    ]
    if not calls:
        raise InputError(f"stats has nothing of {name}; give the stats of a routing_scope around some data")
    load_E = merge_stats(calls).load_E
    if len(load_E) != num_experts or not float(load_E.sum()):
        raise InputError(
            f"stats of {name} count {int(load_E.sum())} rows of {len(load_E)} experts; the layer has "
            f"{num_experts}"
        )
    return [float(load) for load in load_E]


def add_noise(weight_EP: Tensor, index: list[int], pieces: int, noise: float, seed: int) -> Tensor:
    """The rows of a router with noise on those of copies, one for all pieces of a copy.

    Args:
        weight_EP: the rows.
        index: which of the old rows each of them is.
        pieces: experts that are one copy.
        noise: as a share of the standard deviation of the rows.
        seed: of the noise.
    """
    copies = [place for place, source in enumerate(index) if source in index[:place]]
    if not noise or not copies:
        return weight_EP
    shape = (len(index) // pieces, weight_EP.shape[1])
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).repeat_interleave(pieces, 0)
    changed = weight_EP.clone()
    changed[copies] += noise * weight_EP.std(correction=0) * drawn.to(weight_EP)[copies]
    return changed
