"""What a call knows beyond its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import InputError
from .unset import UNSET, UnsetType


@dataclass(frozen=True, kw_only=True)
class RoutingContext:
    """Facts and overrides of one call, handed to the router unchanged by every layer.

    Shapes are given for T tokens, the product of the leading dimensions of the layer's input; a tensor of
    these leading dimensions themselves is accepted as well.

    Attributes:
        mask: bool (T,), True for a real token. Others are neither routed nor counted.
        token_ids: int64 (T,), vocabulary ids, for routers that read them (hash).
        task: name or number of the task, for routers and statistics keyed by it.
        modality_ids: int64 (T,), the modality of each token.
        step: optimiser step, a number or an int64 scalar (which a compiled graph need not specialise on).
            Noise drawn with a step depends only on (layer, step, token), so it is the same on any number of
            ranks and in a recomputation; without one it comes from `generator`.
        generator: source of noise where `step` is None; None means the global generator.
        top_k: experts per token for this call.
        capacity_factor: as in `MoEConfig`, for this call; None means dropless.
        expert_mask: bool (E,) or (T, E), True for an expert that may be chosen.
        ranks: positions in each token's ranking to select instead of 0..top_k-1 (0 is the best).
        num_groups: token groups that share nothing: capacity and priority apply within each. One process
            with `num_groups=W` reproduces W ranks.
        sequence_length: tokens in a sequence, for losses of that scope and soft routing; the layer fills
            it in from an input of shape (..., sequence, model_dim).
        state: named tensors that earlier layers left in `Routing.state`.
    """

    mask: Tensor | None = None
    token_ids: Tensor | None = None
    task: str | int | None = None
    modality_ids: Tensor | None = None
    step: int | Tensor | None = None
    generator: torch.Generator | None = None
    top_k: int | UnsetType = UNSET
    capacity_factor: float | None | UnsetType = UNSET
    expert_mask: Tensor | None = None
    ranks: tuple[int, ...] | None = None
    num_groups: int = 1
    sequence_length: int | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def for_tokens(self, num_tokens: int, sequence_length: int | None) -> RoutingContext:
        """This context with its per-token tensors flattened to (T,), checked against the input.

        Raises:
            InputError: a tensor of another number of tokens, a mask that is not bool, a number of groups
                that does not divide the tokens.
        """
        if self.num_groups < 1 or num_tokens % self.num_groups:
            raise InputError(
                f"num_groups={self.num_groups} must be at least 1 and divide the call's {num_tokens} tokens"
            )
        flat = {
            name: _flatten(name, tensor, num_tokens)
            for name in ("mask", "token_ids", "modality_ids")
            if (tensor := getattr(self, name)) is not None
        }
        if self.mask is not None and self.mask.dtype is not torch.bool:
            raise InputError(
                f"mask has dtype {self.mask.dtype}; expected torch.bool with True for a real token"
            )
        length = self.sequence_length if self.sequence_length is not None else sequence_length
        return dataclasses.replace(self, sequence_length=length, **flat)  # type: ignore[arg-type]


def _flatten(name: str, tensor: Tensor, num_tokens: int) -> Tensor:
    if tensor.numel() != num_tokens:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, {tensor.numel()} values, "
            f"but the layer got {num_tokens} tokens; give one value per token"
        )
    return tensor.reshape(-1)
