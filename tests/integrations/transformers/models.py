"""Whole small models of a handful of classes, one for each way their experts are stored."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 60
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
NAMES = ("deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe")


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in evaluation mode, with experts that differ."""
    torch.manual_seed(0)
    if name == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=5))
    elif name == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**COMMON, intermediate_size=32, num_experts=8))
    elif name == "qwen3_moe":
        config = Qwen3MoeConfig(**COMMON, moe_intermediate_size=32, num_experts=8, head_dim=16)
        model = Qwen3MoeForCausalLM(config)
    elif name == "gpt_oss":
        config = GptOssConfig(**COMMON, intermediate_size=32, num_local_experts=4, head_dim=16)
        model = GptOssForCausalLM(config)
    else:
        heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        config = DeepseekV3Config(
            **{**COMMON, "num_key_value_heads": 2}, **heads, v_head_dim=8, intermediate_size=32, n_group=1,
            moe_intermediate_size=32, n_routed_experts=8, topk_group=1, first_k_dense_replace=1,
        )  # fmt: skip
        model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "experts" in key and parameter.dim() == 3:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    """Token ids, none of which is padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def checkpoint(model: nn.Module, **options: object) -> None:
    """Turn activation checkpointing on; releases differ in its name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)
