"""Small models with routed experts, and text for them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM

from flexpert.models import MoELanguageForCausalLM, language_preset


@pytest.fixture
def mixtral():
    """Makes Mixtrals: no selection bias."""

    def make(**options):
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        sizes |= {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50}
        return MixtralForCausalLM(MixtralConfig(**sizes, **options))

    return make


@pytest.fixture
def deepseek():
    """Makes DeepSeek-V3s: every router has a selection bias."""

    def make():
        torch.manual_seed(0)
        config = DeepseekV3Config(
            vocab_size=50, hidden_size=16, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
            qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
        )  # fmt: skip
        return DeepseekV3ForCausalLM(config)

    return make


@pytest.fixture
def language():
    """Makes byte-level models with Flexpert's layers."""

    def make(**options):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "expert_hidden_dim": 8}
        return MoELanguageForCausalLM(
            language_preset("tiny", **{**sizes, "max_position_embeddings": 64, **options})
        )

    return make


@pytest.fixture
def samples():
    """Eight sequences of 12 tokens below 50; of each, labels for as many as its number, plus 2."""
    ids = torch.randint(1, 50, (8, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for i in range(8):
        labels[i, i + 3 :] = -100
    return [{"input_ids": i, "labels": k} for i, k in zip(ids, labels, strict=True)]
