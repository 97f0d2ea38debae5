"""A model built on the meta device gets the values that one process draws, each rank its part of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flexpert import MoE, MoEConfig
from flexpert.core.errors import ConfigError, DistributedError
from flexpert.experts import ExpertBank
from flexpert.parallel import expert_mesh, full_state_dict, materialize, parallelize
from flexpert.testing import run_ranks
from tests.parallel.cases import MIXED, ScaleExperts

LAYOUTS = {2: {"replicas": 2}, 3: {}, 4: {"slices": 2}}
BASE = {"model_dim": 6, "hidden_dim": 8, "num_experts": 12, "top_k": 2, "expert_bias": True}
KINDS = {
    "mlp": {"num_shared_experts": 1},
    "glu": {"expert": "glu", "router": {"name": "linear", "selection_bias": True, "learned_noise": True}},
    "mixed": {"expert": [{**g, "count": 12 if g["name"] in ("mlp", "glu") else 2} for g in MIXED]},
    "soft": {"router": "soft"},
}
KINDS["mixed"]["num_experts"] = 30


def layer(kind, device):
    torch.manual_seed(5)
    with torch.device(device):
        return MoE(MoEConfig(**{**BASE, **KINDS[kind]})).double()


def dense(device):
    torch.manual_seed(5)
    with torch.device(device):
        config = MoEConfig(**BASE, router="cosine")
        return nn.Sequential(
            nn.Linear(6, 6), nn.BatchNorm1d(6), MoE(config), nn.LayerNorm(6), nn.Linear(6, 2)
        )


def same(got, want):
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def on_ranks(kind):
    model = layer(kind, "meta") if kind in KINDS else dense("meta")
    mesh = expert_mesh(12, **LAYOUTS[dist.get_world_size()])
    states = []
    for way in ("ddp", "fsdp"):
        model = layer(kind, "meta") if kind in KINDS else dense("meta")
        parallelize(model, mesh, dense=way)
        assert not any(t.is_meta for t in model.state_dict().values())
        assert [
            n for n, p in model.named_parameters() if hasattr(p, "to_local") and p.to_local().is_meta
        ] == []
        states.append(full_state_dict(model))
    return states


@pytest.mark.parametrize("world", LAYOUTS)
def test_a_layer_has_the_values_that_it_has_without_meta(world):
    for kind in KINDS:
        want = layer(kind, "cpu").state_dict()
        for state in run_ranks(on_ranks, world, kind)[0]:
            assert same(state, want), kind


def test_a_model_with_dense_layers_does_not_depend_on_the_number_of_ranks():
    want = materialize(dense("meta")).state_dict()
    assert not any(tensor.is_meta for tensor in want.values())
    for world in LAYOUTS:
        for state in run_ranks(on_ranks, world, "dense")[0]:
            assert same(state, want), world


@pytest.mark.parametrize("kind", [*KINDS])
def test_one_process_materializes_what_it_would_have_drawn(kind):
    model = materialize(layer(kind, "meta"))
    assert same(model.state_dict(), layer(kind, "cpu").state_dict())
    assert materialize(model) is model  # nothing is left to do
    assert same(model.state_dict(), layer(kind, "cpu").state_dict())


def test_materializing_leaves_the_generator_and_shared_tensors_alone():
    model = dense("meta")
    model[4].weight = nn.Parameter(torch.empty(6, 6, device="meta"))
    model[4].weight = model[0].weight
    torch.manual_seed(1)
    torch.randint(2**62, ())
    want = torch.get_rng_state()
    torch.manual_seed(1)
    materialize(model)
    assert torch.equal(torch.get_rng_state(), want)
    assert model[4].weight is model[0].weight


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Forgetful(Unknown):
    def reset_parameters(self):
        pass


def test_modules_that_do_not_know_their_values_are_named():
    for kind, message in (
        (Unknown, r"1 \(Unknown\) is on the meta device.*give scale"),
        (Forgetful, "1.scale"),
    ):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(2, 2), kind())
        with pytest.raises(ConfigError, match=message):
            materialize(model)
        if kind is Unknown:
            assert model[0].weight.is_meta


class Stacked(ScaleExperts):
    """A bank that is cut over ranks but does not say what it begins with."""

    def layout(self):
        from flexpert.core.layout import ParamLayout

        return {"scale": ParamLayout(slice_dim=None)}


def refused(way):
    mesh = expert_mesh(4)
    if way == "seeds":
        torch.manual_seed(dist.get_rank())
        with torch.device("meta"):
            model = MoE(MoEConfig(model_dim=6, hidden_dim=8, num_experts=4))
    else:
        with torch.device("meta"):
            router = MoE(MoEConfig(model_dim=6, hidden_dim=8, num_experts=4)).router
            model = MoE(router=router, experts=Stacked(4))
    try:
        parallelize(model, mesh)
    except (ConfigError, DistributedError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_ranks_refuse_a_bank_without_values_and_different_seeds():
    assert issubclass(Stacked, ExpertBank)
    for error in run_ranks(refused, 2, "bank"):
        assert "ConfigError: Stacked.scale is on the meta device" in error
    for error in run_ranks(refused, 2, "seeds"):
        assert "DistributedError: the model's values differ" in error
