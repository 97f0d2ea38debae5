"""Small dense models of every layout, with biases that are not 0, and what is to be fed to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
SWIN = {
    "image_size": 32,
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "mlp_ratio": 3.0,
}
IMAGES = {"image_size": 16, "patch_size": 4}


class Residual(nn.Module):
    """A plain model: blocks of nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12), nn.Dropout(0.2)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


BUILD = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, mlp_bias=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TEXT, num_key_value_heads=4, head_dim=4, tie_word_embeddings=True)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**TEXT, num_key_value_heads=4)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, n_inner=24)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **IMAGES)),
    "swinv2": lambda: transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**SWIN)),
    "plain": Residual,
}
GLOBS = {
    "llama": "model.layers.*.mlp",
    "qwen3": "model.layers.*.mlp",
    "phi3": "*.mlp",
    "gpt2": "transformer.h.*.mlp",
    "bert": "encoder.layer.*.intermediate",
    "vit": "*.mlp",
    "swinv2": "*.blocks.*.intermediate",
    "plain": "blocks.*",
}


@dataclass
class Case:
    """A dense model, a batch for it, and a glob of its MLPs."""

    model: Any
    batch: dict[str, torch.Tensor]
    glob: str

    def outputs(self, model: nn.Module) -> torch.Tensor:
        """fp32 outputs for the batch, in evaluation mode."""
        dtype = next(model.parameters()).dtype
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.batch.items()}
        with torch.no_grad():
            result = model.eval()(**batch)
        return (result if isinstance(result, torch.Tensor) else result[0]).float()


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max())


def _batch(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name in ("vit", "swinv2"):
        size = 16 if name == "vit" else 32
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    if name == "plain":
        return {"x": torch.randn(5, 12, generator=generator)}
    return {"input_ids": torch.randint(3, 40, (2, 7), generator=generator)}


@pytest.fixture
def make_case():
    """Builds the case of a layout."""

    def make(name: str) -> Case:
        torch.manual_seed(0)
        model = BUILD[name]()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
            elif parameter.dim() == 2:
                parameter.data.mul_(3)
        return Case(model=model.eval(), batch=_batch(name), glob=GLOBS[name])

    return make


@pytest.fixture(params=sorted(BUILD))
def case(request, make_case):
    """Every layout."""
    return make_case(request.param)
