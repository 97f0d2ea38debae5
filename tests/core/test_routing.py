"""The routing as a value."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree

from flexpert import MoE, MoEConfig, Routing


def routing_of(router, **options):
    torch.manual_seed(0)
    layer = MoE(MoEConfig(model_dim=4, hidden_dim=4, num_experts=3, router=router, **options))
    return layer(torch.randn(7, 4), return_info=True)[1].routing


@pytest.mark.parametrize(
    ("router", "options"),
    [("linear", {}), ("linear", {"capacity_factor": 0.5}), ("expert_choice", {}), ("soft", {})],
)
def test_is_a_pytree_of_tensors(router, options):
    routing = routing_of(router, **options)
    leaves, spec = pytree.tree_flatten(routing)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) >= 4
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(routing)
    for field in dataclasses.fields(routing):
        assert getattr(again, field.name) is getattr(routing, field.name) or field.name in ("state", "aux")
    halves = pytree.tree_map(lambda v: v.detach() if isinstance(v, torch.Tensor) else v, routing)
    assert torch.equal(halves.counts_E, routing.counts_E)
    assert halves.num_units == 7
    assert halves.num_experts == 3


def test_is_frozen_and_keyword_only():
    routing = routing_of("linear")
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.num_units = 3
    with pytest.raises(TypeError):
        Routing(routing.unit_N, routing.weight_N)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [1], [0, 5]])
@pytest.mark.parametrize("spare", [0, 3])
def test_expert_of_each_row(counts, spare):
    total = sum(counts) + spare
    routing = Routing(
        unit_N=torch.zeros(total).long(),
        weight_N=torch.zeros(total),
        counts_E=torch.tensor(counts),
        num_units=9,
    )
    want = [e for e, n in enumerate(counts) for _ in range(n)] + [len(counts)] * spare
    assert routing.expert_N().tolist() == want
