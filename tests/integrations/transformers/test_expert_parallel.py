"""The expert parallelism of transformers on two ranks, with our experts inside it."""

from __future__ import annotations

import pytest
import torch

from flexpert.testing import assert_close, run_ranks
from tests.integrations.transformers.zoo import of_this_release


def layer_on_ranks(implementation):
    """(got, want): outputs and gradients of a split layer, and of the whole one, on each rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from transformers import MixtralConfig
    from transformers.distributed.expert_parallel import EpDispatchExpertsParallel, MoEParamShard
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    from flexpert.integrations.transformers import enable

    enable()
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
    config._experts_implementation = "flexpert"
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, weights = torch.randn(6, 16, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(6)])

    def run():
        x.grad = weights.grad = None
        y = experts(x, ids, weights)
        y.square().sum().backward()
        return [y.detach(), x.grad, weights.grad]

    rank = torch.distributed.get_rank()
    want = [*run(), *(p.grad.chunk(2)[rank] for p in experts.parameters())]
    mesh, shard = init_device_mesh("cpu", (2,)), MoEParamShard(Shard(0))
    for name in ("gate_up_proj", "down_proj"):
        shard.shard_param(experts, name, mesh)
    experts.num_experts, experts._is_expert_parallel = 2, True
    EpDispatchExpertsParallel().install_forward(experts, mesh, tp_mesh=mesh, ep_implementation=implementation)
    got = [*run(), *(p.grad.to_local() for p in experts.parameters())]
    return got, want


@of_this_release
@pytest.mark.parametrize("implementation", ["all_reduce", "all_to_all"])
def test_two_ranks_compute_what_one_does(implementation):
    for got, want in run_ranks(layer_on_ranks, 2, implementation):
        assert len(got) == len(want) == 5
        for one, other in zip(got, want, strict=True):
            assert_close(one, other, 2e-6)
