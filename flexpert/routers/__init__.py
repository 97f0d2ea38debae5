"""Routers: who computes what. Importing this room registers them by name."""

from __future__ import annotations

from typing import cast

from flexpert.core.config import MoEConfig
from flexpert.core.registry import ROUTERS, split_spec

from .base import Router
from .expert_choice import ExpertChoiceRouter
from .soft import SoftRouter
from .token_choice import CosineRouter, HashRouter, LinearRouter, TokenChoiceRouter

__all__ = [
    "CosineRouter",
    "ExpertChoiceRouter",
    "HashRouter",
    "LinearRouter",
    "Router",
    "SoftRouter",
    "TokenChoiceRouter",
    "build_router",
]


def build_router(config: MoEConfig) -> Router:
    """The router that a layer's config names.

    Raises:
        ConfigError: an unknown name or option; the message lists the valid ones.
    """
    name, options = split_spec(config.router, "router")
    return cast(Router, ROUTERS.get(name)(config, **options))
