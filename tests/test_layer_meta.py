"""Layers without memory: on the meta device, where shapes and dtypes are those of the real one."""

from __future__ import annotations

import pytest
import torch

from flexpert import MoE, MoEConfig

LAYERS = {
    "mlp": {"expert_bias": True},
    "glu": {"expert": "glu", "renormalize": True, "num_shared_experts": 1},
    "capacity": {"capacity_factor": 1.0, "batch_prioritized": True},
    "expert choice": {"router": "expert_choice", "capacity_factor": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward(name, dtype):
    layer = MoE(MoEConfig(model_dim=24, hidden_dim=40, num_experts=6, **LAYERS[name])).to("meta", dtype)
    x = torch.empty(2, 24, 24, device="meta", dtype=dtype, requires_grad=True)
    y = layer(x)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, dtype, "meta")
    y.backward(torch.empty_like(y))
    for leaf in (x, *layer.parameters()):
        assert leaf.grad is not None
        assert (leaf.grad.shape, leaf.grad.device.type) == (leaf.shape, "meta")
