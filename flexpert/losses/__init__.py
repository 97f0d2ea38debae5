"""Loss terms by name: functions (routing, context) -> scalar, unweighted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from flexpert.core.config import MoEConfig
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError
from flexpert.core.registry import LOSSES, check_options, keyword_names, split_spec
from flexpert.core.routing import AnyRouting

from .balance import balance, balance_first_choice
from .common import SCOPES, check_scope
from .entropy import entropy
from .importance_load import importance_load
from .z import z_loss

__all__ = ["balance", "balance_first_choice", "build_losses", "entropy", "importance_load", "z_loss"]

Loss = Callable[[AnyRouting, RoutingContext], Tensor]


def build_losses(config: MoEConfig) -> dict[str, Loss]:
    """The terms that a layer's config names, by name (or by "label", so that one may appear twice).

    Raises:
        ConfigError: an unknown name or option, or the same name twice.
    """
    terms: dict[str, Loss] = {}
    for spec in config.losses:
        name, options = split_spec(spec, "losses")
        label = options.pop("label", name)
        if label in terms:
            raise ConfigError(f"loss {label!r} is named twice; give each a 'label' of its own")
        term = LOSSES.get(name)
        check_options(f"loss {name!r}", options, keyword_names(term))
        check_scope(options.get("scope", "micro_batch"), getattr(term, "scopes", SCOPES))
        terms[label] = partial(term, **options) if options else term
    return terms
