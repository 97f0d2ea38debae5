"""Flexpert: adaptive mixture-of-experts at scale."""

from __future__ import annotations

from .balancers import BiasBalancer
from .core.config import MoEConfig
from .core.context import RoutingContext
from .core.errors import CheckpointError, ConfigError, DistributedError, FlexpertError, InputError
from .core.info import MoEInfo
from .core.routing import CapacityRouting, DenseRouting, Routing
from .core.stats import RoutingStats
from .core.unset import UNSET
from .experts import prepack, unpack
from .layer import MoE
from .scope import routing_scope

__version__ = "0.1.0"

__all__ = [
    "UNSET",
    "BiasBalancer",
    "CapacityRouting",
    "CheckpointError",
    "ConfigError",
    "DenseRouting",
    "DistributedError",
    "FlexpertError",
    "InputError",
    "MoE",
    "MoEConfig",
    "MoEInfo",
    "Routing",
    "RoutingContext",
    "RoutingStats",
    "__version__",
    "prepack",
    "routing_scope",
    "unpack",
]
