"""What a call knows beyond its tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import InputError
from .unset import UNSET, UnsetType, pick


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
            Noise drawn with a step depends only on (layer, step, token), so it is the same in a
            recomputation and, with `samples`, on any number of ranks; without one it comes from `generator`.
        generator: source of noise where `step` is None; None means the global generator.
        samples: (first, end), the place of this call's samples in the batch that the ranks (or micro-batches)
            of one step share; noise then goes by the token's place in that batch. Every sample has the same
            number of tokens; end == first for a call without any. None: the call is the batch.
        all_reduce: the differentiable sum, over the ranks that share the batch, of a tensor of equal shape on
            each; its backward sums the gradients over them likewise. For losses of the scope "global". None:
            one process has the batch.
        top_k: experts per token for this call.
        capacity_factor: as in `MoEConfig`, for this call; None means dropless.
        expert_mask: bool (E,) or (T, E), True for an expert that may be chosen.
        ranks: positions in each token's ranking to select instead of 0..top_k-1 (0 is the best); top_k is
            then their number.
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
    samples: tuple[int, int] | None = None
    all_reduce: Callable[[Tensor], Tensor] | None = None
    top_k: int | UnsetType = UNSET
    capacity_factor: float | None | UnsetType = UNSET
    expert_mask: Tensor | None = None
    ranks: tuple[int, ...] | None = None
    num_groups: int = 1
    sequence_length: int | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def with_overrides(
        self, top_k: int | UnsetType = UNSET, capacity_factor: float | None | UnsetType = UNSET
    ) -> RoutingContext:
        """This context with those of the values that are given in place of its own."""
        if top_k is UNSET and capacity_factor is UNSET:
            return self
        return dataclasses.replace(
            self, top_k=pick(top_k, self.top_k), capacity_factor=pick(capacity_factor, self.capacity_factor)
        )

    def for_tokens(self, leading: Sequence[int]) -> RoutingContext:
        """This context with its per-token tensors flattened to (T,), checked against the input.

        Args:
            leading: the input's shape without its last dimension.

        Raises:
            InputError: a tensor of another shape or dtype, a number of groups or samples that does not
                divide the tokens.
        """
        tokens = math.prod(leading)
        if self.num_groups < 1 or tokens % self.num_groups:
            raise InputError(
                f"num_groups={self.num_groups} must be at least 1 and divide the call's {tokens} tokens"
            )
        if self.samples is not None:
            _check_samples(self.samples, tokens)
        flat = {
            name: _flatten(name, tensor, leading)
            for name in ("mask", "token_ids", "modality_ids")
            if (tensor := getattr(self, name)) is not None
        }
        if self.expert_mask is not None:
            _check_bool("expert_mask", self.expert_mask, "an expert that may be chosen")
            if same_shape(self.expert_mask.shape[:-1], leading):
                flat["expert_mask"] = self.expert_mask.reshape(tokens, self.expert_mask.shape[-1])
        if self.mask is not None:
            _check_bool("mask", self.mask, "a real token")
        length = self.sequence_length
        if length is not None and length < 1:
            raise InputError(f"sequence_length={length}: expected at least 1")
        if length is None and len(leading) > 1:
            length = leading[-1]
        if length == self.sequence_length and all(getattr(self, name) is flat[name] for name in flat):
            return self
        return dataclasses.replace(self, sequence_length=length, **flat)  # type: ignore[arg-type]

    def first_token(self, tokens: int) -> int:
        """The place of this call's first token in the batch that `samples` counts in; 0 without it.

        Args:
            tokens: T.
        """
        if self.samples is None:
            return 0
        first, end = self.samples
        return tokens // max(end - first, 1) * first

    def hide_padding(self, x_TD: Tensor) -> Tensor:
        """The tokens with 0 for padding, so that nothing it holds, NaN included, reaches a real token."""
        return x_TD if self.mask is None else x_TD.masked_fill(~self.mask[:, None], 0.0)


def same_shape(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether two shapes are equal, one by one: a compiled graph's symbols are not found equal as tuples."""
    return len(shape) == len(expected) and all(a == b for a, b in zip(shape, expected, strict=True))


def _flatten(name: str, tensor: Tensor, leading: Sequence[int]) -> Tensor:
    if not (same_shape(tensor.shape, leading) or same_shape(tensor.shape, [math.prod(leading)])):
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, but the layer's tokens have {tuple(leading)}; "
            f"give one value per token"
        )
    if name.endswith("_ids") and (tensor.is_floating_point() or tensor.dtype is torch.bool):
        raise InputError(f"{name} has dtype {tensor.dtype}; expected torch.int64")
    return tensor if tensor.dim() == 1 else tensor.reshape(-1)


def _check_samples(samples: tuple[int, int], tokens: int) -> None:
    if not (isinstance(samples, tuple) and [isinstance(place, int) for place in samples] == [True, True]):
        raise InputError(f"samples={samples!r}: expected two integers (first, end)")
    first, end = samples
    if not 0 <= first <= end:
        raise InputError(f"samples={samples!r}: expected 0 <= first <= end")
    count = end - first
    if (tokens % count if count else tokens) != 0:
        raise InputError(
            f"samples={samples!r}: the call's {tokens} tokens cannot be {count} samples of one length"
        )


def _check_bool(name: str, tensor: Tensor, meaning: str) -> None:
    if tensor.dtype is not torch.bool:
        raise InputError(f"{name} has dtype {tensor.dtype}; expected torch.bool with True for {meaning}")
