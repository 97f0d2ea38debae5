"""What several losses need: the tokens that count, and their sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError, InputError
from flexpert.core.routing import AnyRouting

SCOPES = ("micro_batch", "sequence")


def check_scope(scope: Any) -> None:
    """Raise `ConfigError` unless it is a scope that losses know."""
    if scope not in SCOPES:
        raise ConfigError(f"scope={scope!r}: expected one of {', '.join(SCOPES)}")


def num_sequences(scope: str, context: RoutingContext, tokens: int) -> int:
    """Parts that a loss of this scope is computed on before averaging: 1, or the number of sequences.

    Raises:
        ConfigError: an unknown scope.
        InputError: scope "sequence" on an input without sequences.
    """
    check_scope(scope)
    if scope == "micro_batch" or tokens == 0:
        return 1
    length = context.sequence_length
    if not length or tokens % length:
        raise InputError(
            f"scope='sequence' needs an input of shape (..., sequence, model_dim) or a sequence_length "
            f"that divides the {tokens} tokens; got sequence_length={length}"
        )
    return tokens // length


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
    """Values with padding tokens at 0, and the number of real tokens (at least 1)."""
    if context.mask is None:
        return values_T, values_T.new_tensor(max(values_T.shape[0], 1))
    mask_T = context.mask.view(-1, *[1] * (values_T.dim() - 1))
    return values_T.where(mask_T, 0.0), context.mask.sum().clamp(min=1).to(values_T.dtype)
