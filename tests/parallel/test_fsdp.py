"""A dense part that FSDP shards gets the gradients of one process, scalar parameters included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flexpert import MoE, MoEConfig
from flexpert.parallel import expert_mesh, no_sync, parallelize
from flexpert.testing import assert_close, run_ranks

D = 6


def build(router):
    torch.manual_seed(3)
    config = MoEConfig(model_dim=D, hidden_dim=8, num_experts=4, top_k=2, router=router)
    return nn.Sequential(nn.Linear(D, D), MoE(config), nn.Linear(D, D)).double()


def batch():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(12, D, generator=generator, dtype=torch.float64)


def gradients(router, accumulate):
    model = parallelize(build(router), expert_mesh(4), dense="fsdp")
    x = batch().chunk(dist.get_world_size())[dist.get_rank()]
    if accumulate:
        with no_sync(model):
            model(x).square().mean().backward()
    model(x).square().mean().backward()
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_gradients_are_those_of_one_process(router, accumulate):
    model = build(router)
    ((1 + accumulate) * model(batch()).square().mean()).backward()
    for result in run_ranks(gradients, 2, router, accumulate):
        for name, parameter in model.named_parameters():
            assert_close(result[name], parameter.grad, 1e-12, name=name)
