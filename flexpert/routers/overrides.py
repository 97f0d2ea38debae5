"""What a call may change about its routing, and which routers cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.config import MoEConfig
from flexpert.core.context import RoutingContext, same_shape
from flexpert.core.errors import ConfigError, InputError
from flexpert.core.unset import UNSET


def allowed_experts(context: RoutingContext, logits_TE: Tensor) -> Tensor | None:
    """bool, broadcastable to (T, E): the experts that may be chosen; None for all.

    Raises:
        InputError: an expert_mask of another shape.
    """
    mask = context.expert_mask
    if mask is None:
        return None
    if not (same_shape(mask.shape, logits_TE.shape) or same_shape(mask.shape, logits_TE.shape[1:])):
        raise InputError(
            f"expert_mask has shape {tuple(mask.shape)}; expected ({logits_TE.shape[1]},) or "
            f"{tuple(logits_TE.shape)}"
        )
    return mask if mask.dim() == 2 else mask[None]


def rule_out(logits_TE: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits with the lowest number for experts that may not be chosen."""
    return logits_TE if allowed is None else logits_TE.masked_fill(~allowed, torch.finfo(logits_TE.dtype).min)


def refuse(context: RoutingContext, router: str, *names: str) -> None:
    """Raise `InputError` where the call asks for something that a router cannot do.

    Args:
        context: of the call.
        router: what refuses, for the message.
        names: fields of the context; None or `UNSET` in one asks for nothing.
    """
    for name in names:
        value = getattr(context, name)
        if value is not None and value is not UNSET:
            shown = tuple(value.shape) if isinstance(value, Tensor) else value
            raise InputError(f"{name}={shown!r}: {router} has no use for it; leave it out")


def refuse_settings(config: MoEConfig, router: str, *names: str) -> None:
    """Raise `ConfigError` where a layer's config asks for something that a router cannot do.

    Args:
        config: of the layer.
        router: name of what refuses, for the message.
        names: fields of the config; None or False in one asks for nothing.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value is not False:
            raise ConfigError(f"{name}={value!r}: router {router!r} has no use for it; leave it out")
