from __future__ import annotations

from typing import Any

import pytest
import torch

from flexpert.models import SwinV2MoEConfig, preset


@pytest.fixture
def small_config():
    """Makes configurations of the tiny preset's form, cut down for speed: two MoE layers of 4 experts."""

    def make(**settings: Any) -> SwinV2MoEConfig:
        small = {
            "embed_dim": 8,
            "depths": (1, 2, 2),
            "num_heads": (1, 2, 2),
            "num_experts": 4,
            "num_labels": 5,
        }
        return preset("tiny", **{**small, **settings})

    return make


@pytest.fixture
def batch():
    """Six random images and their labels."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 1, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])
