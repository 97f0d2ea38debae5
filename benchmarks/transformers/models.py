"""Models of three published shapes, cut down to what a small machine holds; weights are random."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 4096
COMMON = {
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "eos_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
}


def make(name: str) -> nn.Module:
    """The model of that name in fp32."""
    torch.manual_seed(0)
    kind, config = SHAPES[name]()
    return kind(config)


def _mixtral() -> tuple[type[nn.Module], PreTrainedConfig]:
    config = MixtralConfig(**COMMON, intermediate_size=1792, num_local_experts=8, num_experts_per_tok=2)
    return MixtralForCausalLM, config


def _olmoe() -> tuple[type[nn.Module], PreTrainedConfig]:
    config = OlmoeConfig(**COMMON, intermediate_size=256, num_experts=64, num_experts_per_tok=8)
    return OlmoeForCausalLM, config


def _qwen3() -> tuple[type[nn.Module], PreTrainedConfig]:
    config = Qwen3MoeConfig(
        **COMMON, head_dim=64, moe_intermediate_size=192, num_experts=128, num_experts_per_tok=8
    )
    return Qwen3MoeForCausalLM, config


SHAPES = {"Mixtral-like": _mixtral, "OLMoE-like": _olmoe, "Qwen3-MoE-like": _qwen3}
