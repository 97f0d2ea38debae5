from __future__ import annotations

import pytest

from flexpert import ConfigError, MoEConfig
from flexpert.models import SwinV2MoEConfig, preset


def test_moe_blocks_of_the_paper():
    stage_3 = [(2, block) for block in (1, 3, 5, 7, 9, 11, 13, 15, 17)]
    for name in ("small", "base"):
        assert preset(name).moe_places() == [*stage_3, (3, 1)]


def test_published_settings():
    config = preset("base")
    assert (config.image_size, config.window_size, config.num_labels) == (192, 12, 21841)
    assert (config.embed_dim, tuple(config.num_heads), config.drop_path_rate) == (128, (4, 8, 16, 32), 0.3)
    layer = config.moe_layer(2)
    assert layer == MoEConfig(
        model_dim=512,
        hidden_dim=2048,
        num_experts=32,
        top_k=1,
        router={"name": "linear", "gate_noise": 1.0},
        expert={"name": "mlp_dropout", "init_std": 0.005, "dropout": 0.1},
        expert_bias="b1",
        capacity_factor=1.25,
        batch_prioritized=True,
        losses=("importance_load",),
    )


def test_cosine_router_with_options():
    layer = preset("tiny", router={"name": "cosine", "temperature": 0.3, "gate_noise": 0.5}).moe_layer(1)
    assert layer.router == {"name": "cosine", "temperature": 0.3, "gate_noise": 0.5}


def test_router_without_gate_noise():
    layer = preset("tiny", router="expert_choice", gate_noise=0, balance_loss="balance").moe_layer(1)
    assert layer.router == {"name": "expert_choice"}


def test_chosen_moe_blocks():
    config = preset("tiny", depths=(2, 2, 2), moe_blocks=[[1], [], [1, 0]])
    assert config.moe_places() == [(0, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("num_experts", [0, None])
def test_dense_twin_has_no_moe_layer(num_experts):
    assert preset("tiny", num_experts=num_experts).moe_places() == []


def test_round_trip_through_json(tmp_path):
    config = preset("tiny", router={"name": "cosine", "proj_dim": 16}, moe_blocks=[[], [0, 1], []])
    config.save_pretrained(tmp_path)
    assert SwinV2MoEConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_expert": 4}, "unknown option 'num_expert'.*num_experts"),
        ({"num_experts": "8"}, "num_experts.*'8'"),
        ({"num_experts": -1}, "num_experts=-1"),
        ({"top_k": 9}, "top_k=9.*num_experts=8"),
        ({"capacity_factor": "much"}, "capacity_factor.*'much'"),
        ({"router": {"proj_dim": 4}}, "router=.*name"),
        ({"gate_noise": 0}, "importance_load.*gate_noise > 0"),
        ({"balance_reduction": "max"}, "balance_reduction='max'"),
        ({"balance_scope": "sequence"}, "scope='sequence': expected one of micro_batch, global"),
        ({"balance_loss": "balanse"}, "unknown loss 'balanse'"),
        ({"moe_blocks": [[1]]}, "moe_blocks.*each of 3 stages"),
        ({"moe_blocks": [[], [4], []]}, "stage 1 has blocks 0..1, not 4"),
        ({"num_heads": (2, 4)}, "num_heads.*differ in length"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        preset("tiny", **settings)


def test_scope_of_the_balance_loss():
    assert preset("base").moe_layer(2).losses == ("importance_load",)  # each rank for itself, as published
    layer = preset("base", balance_scope="global").moe_layer(2)
    assert layer.losses == ({"name": "importance_load", "scope": "global"},)
    assert preset("tiny").moe_layer(1).losses == layer.losses


def test_unknown_preset_lists_the_names():
    with pytest.raises(ConfigError, match="unknown preset 'tny': did you mean 'tiny'.*base, small, tiny"):
        preset("tny")


@pytest.mark.parametrize("labels", [{"num_labels": "ten"}, {"id2label": 3}])
def test_labels_that_transformers_refuses(labels):
    with pytest.raises(ConfigError, match="preset 'tiny': "):
        preset("tiny", **labels)
