from __future__ import annotations

import pytest
from torch import nn

from flexpert.experts import ModuleExperts, StackedModules
from flexpert.models import SwinV2MoEForImageClassification, no_weight_decay, parameter_groups


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_experts": 0}, {"router": {"name": "cosine", "proj_dim": 8}}, {"mlp_fc2_bias": True}],
)
def test_groups_hold_every_parameter_once(small_config, settings):
    model = SwinV2MoEForImageClassification(small_config(**settings))
    decayed, exempt = parameter_groups(model, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert exempt["weight_decay"] == 0.0
    grouped = [id(p) for group in (decayed, exempt) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_frozen_parameters_are_left_out(small_config):
    model = SwinV2MoEForImageClassification(small_config())
    model.classifier.weight.requires_grad_(False)
    grouped = [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert id(model.classifier.weight) not in grouped


def test_what_is_not_decayed(small_config):
    config = small_config(
        router={"name": "cosine", "proj_dim": 8}, mlp_fc2_bias=True, use_absolute_embeddings=True
    )
    names = no_weight_decay(SwinV2MoEForImageClassification(config))
    block = "swinv2.encoder.layers.1.blocks.1"
    for name in (
        f"{block}.attention.self.continuous_position_bias_mlp.0.weight",
        f"{block}.attention.self.logit_scale",
        f"{block}.attention.self.query.bias",
        f"{block}.layernorm_after.weight",
        f"{block}.intermediate.experts.b1",
        f"{block}.intermediate.experts.b2",
        f"{block}.intermediate.router.weight",
        f"{block}.intermediate.router.log_scale",
        f"{block}.intermediate.router.projector.weight",
        "swinv2.embeddings.position_embeddings",
        "classifier.bias",
    ):
        assert name in names
    for name in (
        f"{block}.attention.self.query.weight",
        f"{block}.intermediate.experts.w1",
        f"{block}.intermediate.experts.w2",
        "swinv2.embeddings.patch_embeddings.projection.weight",
        "swinv2.encoder.layers.0.downsample.reduction.weight",
        "classifier.weight",
    ):
        assert name not in names


def test_linear_router_is_decayed(small_config):
    names = no_weight_decay(SwinV2MoEForImageClassification(small_config()))
    assert "swinv2.encoder.layers.1.blocks.1.intermediate.router.weight" not in names


def test_experts_of_ones_own_are_treated_as_their_modules_are():
    modules = [nn.Linear(4, 4), nn.Linear(4, 4)]
    stacked = StackedModules(modules, model_dim=4)
    unlike = ModuleExperts([*modules, nn.LayerNorm(4)], model_dim=4)
    assert no_weight_decay(nn.Sequential(stacked)) == {"0.module.bias"}
    assert no_weight_decay(nn.Sequential(unlike)) == {
        f"0.experts.{name}" for name in ("0.bias", "1.bias", "2.weight", "2.bias")
    }
    unlike.hold(range(3))
    assert no_weight_decay(nn.Sequential(unlike)) == {"0.vectors_float32"}
