"""Recipes: whole models with MoE layers, thin on top of existing backbones. Needs the extra `vision`.

Importing this room makes its models known to the Auto classes of `transformers`.
"""

from __future__ import annotations

try:
    import transformers  # noqa: F401  (asked for here so that its absence has one clear message)
except ImportError as error:
    raise ImportError(
        "flexpert.models needs the package transformers: pip install 'flexpert[vision]'"
    ) from error

from .moe_lm import MoELanguageForCausalLM, MoELanguageModel, MoELanguageOutput
from .moe_lm_config import MoELanguageConfig, language_preset
from .swinv2_moe import (
    SwinV2MoEConfig,
    SwinV2MoEForImageClassification,
    SwinV2MoEModel,
    SwinV2MoEOutput,
    no_weight_decay,
    parameter_groups,
    preset,
)

__all__ = [
    "MoELanguageConfig",
    "MoELanguageForCausalLM",
    "MoELanguageModel",
    "MoELanguageOutput",
    "SwinV2MoEConfig",
    "SwinV2MoEForImageClassification",
    "SwinV2MoEModel",
    "SwinV2MoEOutput",
    "language_preset",
    "no_weight_decay",
    "parameter_groups",
    "preset",
]
