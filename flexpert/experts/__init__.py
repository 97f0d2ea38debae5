"""Experts: what computes rows. Importing this room registers the kinds by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpert.core.config import MoEConfig
from flexpert.core.errors import ConfigError
from flexpert.core.registry import EXPERTS, Spec, check_options, keyword_names, split_spec

from .bank import ExpertBank, ExpertBatch
from .dropout import DEFAULT_DROPOUT, DropoutGLUExperts, DropoutMLPExperts
from .mixed import MixedExperts
from .mlp import GLUExperts, MLPExperts
from .modules import ModuleExperts
from .packed import PackableBank, prepack, unpack
from .shared import SharedExpert
from .stacked import StackedModules
from .zero_computation import ConstantExperts, CopyExperts, ZeroExperts

__all__ = [
    "ConstantExperts",
    "CopyExperts",
    "DropoutGLUExperts",
    "DropoutMLPExperts",
    "ExpertBank",
    "ExpertBatch",
    "GLUExperts",
    "MLPExperts",
    "MixedExperts",
    "ModuleExperts",
    "PackableBank",
    "SharedExpert",
    "StackedModules",
    "ZeroExperts",
    "build_experts",
    "build_shared",
    "prepack",
    "unpack",
]


def build_experts(config: MoEConfig) -> ExpertBank:
    """The bank that a layer's config names; one kind alone is the bank itself, several become `MixedExperts`.

    Raises:
        ConfigError: an unknown kind or option, or counts that do not sum to num_experts.
    """
    if isinstance(config.expert, (str, Mapping)):
        return _build_group(config, config.expert, config.num_experts)
    groups: dict[str, ExpertBank] = {}
    for spec in config.expert:
        name, options = split_spec(spec, "expert")
        count = options.pop("count", 1)
        label = options.pop("label", name)
        if label in groups:
            raise ConfigError(f"expert group {label!r} is named twice; give each a 'label' of its own")
        groups[label] = _build_group(config, {"name": name, **options}, count)
    total = sum(group.num_experts for group in groups.values())
    if total != config.num_experts:
        raise ConfigError(
            f"expert counts sum to {total}, but num_experts={config.num_experts}; make them equal"
        )
    return MixedExperts(groups)


def build_shared(config: MoEConfig) -> SharedExpert | None:
    """The shared expert of a layer's config: gated, and with dropout, where the (first) expert kind is."""
    if not config.num_shared_experts:
        return None
    first = config.expert if isinstance(config.expert, (str, Mapping)) else config.expert[0]
    name, options = split_spec(first, "expert")
    kind = EXPERTS.get(name)
    drops = isinstance(kind, type) and issubclass(kind, DropoutMLPExperts)
    return SharedExpert(
        count=config.num_shared_experts,
        gated=getattr(kind, "gated", False),
        gate=config.shared_gate,
        dropout=options.get("dropout", DEFAULT_DROPOUT) if drops else 0.0,
        model_dim=config.model_dim,
        hidden_dim=config.shared_hidden_dim or config.hidden_dim,
        output_dim=config.output_dim,
        activation=config.activation,
        bias=config.expert_bias,
    )


def _build_group(config: MoEConfig, spec: Spec, count: Any) -> ExpertBank:
    name, options = split_spec(spec, "expert")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"expert {name!r}: count={count!r}, expected an integer >= 1")
    kind = EXPERTS.get(name)
    names = set(keyword_names(kind)) - {"num_experts", "model_dim"}
    check_options(f"expert {name!r}", options, names)
    offered = {
        "hidden_dim": config.hidden_dim,
        "output_dim": config.output_dim,
        "activation": config.activation,
        "bias": config.expert_bias,
    }
    arguments = {key: value for key, value in offered.items() if key in names} | options
    return kind(num_experts=count, model_dim=config.model_dim, **arguments)
