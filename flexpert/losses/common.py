"""What several losses need: the tokens that count, their sequences, and sums over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError, InputError
from flexpert.core.routing import AnyRouting

SCOPES = ("micro_batch", "sequence", "global")
BATCH_SCOPES = ("micro_batch", "global")

Term = TypeVar("Term", bound=Callable[..., Tensor])


def with_scopes(scopes: Sequence[str]) -> Callable[[Term], Term]:
    """Decorator that names the scopes a loss has, so that a config with another is refused when built."""

    def mark(term: Term) -> Term:
        vars(term)["scopes"] = tuple(scopes)
        return term

    return mark


def check_scope(scope: Any, scopes: Sequence[str] = SCOPES) -> None:
    """Raise `ConfigError` unless it is one of the scopes."""
    if scope not in scopes:
        raise ConfigError(f"scope={scope!r}: expected one of {', '.join(scopes)}")


def num_sequences(scope: str, context: RoutingContext, tokens: int) -> int:
    """Parts that a loss of this scope is computed on before averaging: 1, or the number of sequences.

    Raises:
        ConfigError: an unknown scope.
        InputError: scope "sequence" on an input without sequences.
    """
    check_scope(scope)
    if scope != "sequence" or tokens == 0:
        return 1
    length = context.sequence_length
    if not length or tokens % length:
        raise InputError(
            f"scope='sequence' needs an input of shape (..., sequence, model_dim) or a sequence_length "
            f"that divides the {tokens} tokens; got sequence_length={length}"
        )
    return tokens // length


def over_ranks(scope: str, context: RoutingContext, *parts: Tensor) -> tuple[Tensor, ...]:
    """The parts, summed over the ranks that share the batch where the scope is "global".

    One reduction for all of them, also on a rank without tokens. What needs no gradient gets none.
    """
    if scope != "global" or context.all_reduce is None:
        return parts
    total = context.all_reduce(torch.cat([part.flatten() for part in parts]))
    pieces = total.split([part.numel() for part in parts])
    return tuple(
        (piece if part.requires_grad else piece.detach()).view(part.shape)
        for piece, part in zip(pieces, parts, strict=True)
    )


def mean_over_tokens(values_T: Tensor, scope: str, context: RoutingContext) -> Tensor:
    """The mean over real tokens, those of all ranks where the scope is "global"; 0 without tokens.

    Raises:
        ConfigError: a scope that is not for whole batches.
    """
    check_scope(scope, BATCH_SCOPES)
    values_T, count = real(values_T, context)
    total, count = over_ranks(scope, context, values_T.sum(), count)
    return total / count.clamp(min=1)


def logits_of(routing: AnyRouting, loss: str) -> Tensor:
    """The routing's logits (T, E), or an error that names the loss."""
    if routing.logits_TE is None:
        raise InputError(
            f"loss {loss!r} needs logits, which this router does not give; remove it from losses"
        )
    return routing.logits_TE


def probs_of(routing: AnyRouting, loss: str) -> Tensor:
    """The routing's gate scores (T, E), or an error that names the loss."""
    if routing.probs_TE is None:
        raise InputError(
            f"loss {loss!r} needs gate scores, which this router does not give; remove it from losses"
        )
    return routing.probs_TE


def real(values_T: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
    """Values with padding tokens at 0, and the number of real tokens."""
    if context.mask is None:
        return values_T, values_T.new_tensor(values_T.shape[0])
    mask_T = context.mask.view(-1, *[1] * (values_T.dim() - 1))
    return values_T.where(mask_T, 0.0), context.mask.sum().to(values_T.dtype)
