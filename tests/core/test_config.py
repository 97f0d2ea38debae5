"""The configuration: round trips, what it counts, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from flexpert import ConfigError, FlexpertError, MoE, MoEConfig
from flexpert.ops import use_backend

BASE = {"model_dim": 6, "hidden_dim": 10, "num_experts": 4}

CONFIGS = {
    "default": {},
    "published": {
        "num_experts": 32,
        "router": {"name": "cosine", "temperature": 0.5, "gate_noise": 1.0, "proj_dim": 8},
        "expert_bias": "b1",
        "capacity_factor": 1.25,
        "batch_prioritized": True,
        "losses": ["importance_load", {"name": "balance", "scope": "sequence"}],
    },
    "nested": {
        "top_k": 3,
        "router": {"name": "linear", "selection": {"name": "group_limited", "groups": 2, "groups_kept": 2}},
        "expert": [{"name": "glu", "count": 2}, "zero", {"name": "constant", "label": "rest"}],
        "combine": {"name": "scaled", "scale": 2.0},
    },
    "shared": {
        "top_k": 2,
        "expert": "glu",
        "activation": "silu",
        "expert_bias": True,
        "num_shared_experts": 2,
        "shared_gate": True,
        "output_dim": 3,
        "renormalize": "always",
    },
    "hash": {"router": {"name": "hash", "seed": 3}, "top_k": 2, "losses": []},
    "learned noise": {"router": {"name": "linear", "learned_noise": True}, "output_dim": 9},
    "expert choice": {"router": {"name": "expert_choice", "score": "cosine", "proj_dim": 3}, "top_k": 2},
    "soft": {"router": {"name": "soft", "slots_per_expert": 3}, "expert_bias": "b2"},
}


def make(name):
    return MoEConfig(**{**BASE, **CONFIGS[name]})


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips(name):
    config = make(name)
    data = config.to_dict()
    assert MoEConfig.from_dict(data) == config
    assert MoEConfig.from_dict(json.loads(json.dumps(data))) == config
    assert MoEConfig.from_dict(yaml.safe_load(yaml.safe_dump(data))) == config
    assert set(data) == {field.name for field in dataclasses.fields(MoEConfig)}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_the_layer(name):
    config = make(name)
    layer = config.build()
    assert isinstance(layer, MoE)
    assert layer.config is config
    assert config.num_params() == sum(p.numel() for p in layer.parameters())
    assert config.num_active_params() == layer.num_active_params() <= config.num_params()
    assert config.flops_per_token() == layer.flops_per_token()


def test_active_params_by_hand():
    assert make("default").num_active_params() == 4 * 6 + 2 * 6 * 10
    shared = make("shared")  # GLU with all biases, output 3
    expert = 2 * 10 * 6 + 2 * 10 + 3 * 10 + 3
    both = 2 * 20 * 6 + 2 * 20 + 3 * 20 + 3 + 6
    assert shared.num_active_params() == 4 * 6 + 2 * expert + both
    assert shared.num_params() == 4 * 6 + 4 * expert + both
    nested = make("nested")  # two GLUs and the constant expert are the three largest
    assert nested.num_active_params() == 4 * 6 + 2 * 3 * 6 * 10 + 3 * 6
    assert make("soft").num_active_params() == make("soft").num_params()


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("nested", "soft")])
def test_flops_are_those_of_the_matrix_products(name):
    """Against PyTorch's own counter, on a plain computation of as many rows as tokens have experts."""
    config, tokens = make(name), 8
    layer = config.build()
    counter = FlopCounterMode(display=False)
    x = torch.randn(tokens, 6)
    with counter, torch.no_grad(), use_backend("reference"):  # whose products the counter sees
        if config.router != "hash" and "hash" not in str(config.router):
            layer.router.score(x, None)
            if layer.router.state_dict().get("noise_weight") is not None:
                torch.nn.functional.linear(x, layer.router.noise_weight)
        for _ in range(layer.router.top_k):
            hidden = torch.nn.functional.linear(x, layer.experts.w1[0].flatten(0, -2))
            torch.nn.functional.linear(hidden[:, :10], layer.experts.w2[0])
        if layer.shared is not None:
            layer.shared(x)
    assert config.flops_per_token() * tokens == counter.get_total_flops()


def test_flops_of_soft_routing():
    layer = make("soft").build()
    slots = 3 * 4
    assert layer.router.flops_per_token() == 3 * 2 * 6 * slots


def test_asking_does_not_move_the_global_generator():
    config, before = make("published"), torch.get_rng_state()
    config.num_params(), config.num_active_params(), config.flops_per_token()
    assert torch.equal(before, torch.get_rng_state())


def test_layers_of_any_size_are_counted_without_memory():
    config = MoEConfig(model_dim=16384, hidden_dim=65536, num_experts=1024, top_k=8, expert="glu")
    assert config.num_params() == 1024 * 3 * 16384 * 65536 + 1024 * 16384
    with torch.device("meta"):
        layer = config.build()
    assert all(p.is_meta for p in layer.parameters())


def test_callers_dicts_are_neither_changed_nor_shared():
    router = {"name": "linear", "selection": {"name": "top_p", "p": 0.5}}
    experts = [{"name": "mlp", "count": 3}, {"name": "zero", "count": 1}]
    losses = [{"name": "balance", "scope": "sequence", "label": "b"}]
    given = {**BASE, "router": router, "expert": experts, "losses": losses}
    before = copy.deepcopy(given)
    config = MoEConfig.from_dict(given)
    config.build()
    MoE(config)
    assert given == before
    router["selection"]["p"] = 0.9
    losses[0]["label"] = "c"
    assert config.router["selection"]["p"] == 0.5
    assert config.losses[0]["label"] == "b"
    config.to_dict()["router"]["name"] = "hash"
    assert config.router["name"] == "linear"


def test_is_frozen_and_keyword_only():
    config = make("default")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 2
    with pytest.raises(TypeError):
        MoEConfig(6, 10, 4)
    assert dataclasses.replace(config, top_k=2).top_k == 2
    with pytest.raises(ConfigError, match="top_k=5"):
        dataclasses.replace(config, top_k=5)


def test_misspelt_and_missing_keys():
    with pytest.raises(
        ConfigError, match="MoEConfig: unknown option 'capacity_facto'; did you mean 'capacity_factor'"
    ):
        MoEConfig.from_dict({**BASE, "capacity_facto": 1.0})
    with pytest.raises(ConfigError, match="MoEConfig: missing model_dim, num_experts"):
        MoEConfig.from_dict({"hidden_dim": 3})


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_dim": 0}, "model_dim=0: expected an integer >= 1"),
        ({"model_dim": 6.0}, "model_dim=6.0: expected an integer >= 1"),
        ({"hidden_dim": -3}, "hidden_dim=-3: expected an integer >= 1"),
        ({"num_experts": 0}, "num_experts=0: expected an integer >= 1"),
        ({"num_experts": True, "top_k": 1}, "num_experts=True: expected an integer >= 1"),
        ({"num_experts": "4"}, "num_experts='4': expected an integer >= 1"),
        ({"top_k": 0}, "top_k=0: expected an integer, 1 <= top_k <= num_experts=4"),
        ({"top_k": 5}, "top_k=5: expected an integer, 1 <= top_k <= num_experts=4"),
        ({"top_k": True}, "top_k=True: expected an integer"),
        ({"top_k": None}, "top_k=None: expected an integer"),
        ({"output_dim": 0}, "output_dim=0: expected an integer >= 1"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1: expected an integer >= 0"),
        ({"shared_gate": True}, "shared_gate=True needs num_shared_experts >= 1"),
        ({"shared_gate": "yes", "num_shared_experts": 1}, "shared_gate='yes': expected True or False"),
        ({"shared_hidden_dim": 4}, "shared_hidden_dim=4 needs num_shared_experts >= 1"),
        ({"shared_hidden_dim": 0, "num_shared_experts": 1}, "shared_hidden_dim=0: expected an integer >= 1"),
        ({"batch_prioritized": "false"}, "batch_prioritized='false': expected True or False"),
        ({"renormalize": "never"}, "renormalize='never': expected False, True .* or 'always'"),
        ({"expert_bias": "b3"}, "expert_bias='b3': expected False, True, 'b1' or 'b2'"),
        ({"capacity_factor": NAN}, r"capacity_factor=nan: expected None \(dropless\), a number > 0"),
        ({"capacity_factor": -INF}, "capacity_factor=-inf"),
        ({"capacity_factor": True}, "capacity_factor=True"),
        ({"capacity_factor": "1.25"}, "capacity_factor='1.25'"),
        ({"router": {"nam": "linear"}}, "router=.*expected a name or a dict with the key 'name'"),
        ({"router": 3}, "router=3: expected a name or a dict"),
        ({"combine": None}, "combine=None: expected a name or a dict"),
        ({"expert": 3}, "expert=3: expected a list of names or of dicts"),
        ({"expert": ["mlp", 3]}, "expert=3: expected a name or a dict"),
        ({"expert": {"count": 4}}, "expert=.*expected a name or a dict with the key 'name'"),
        ({"losses": "balance"}, "losses='balance': expected a list of names"),
        ({"losses": {"name": "balance"}}, "losses=.*expected a list of names"),
        ({"losses": None}, "losses=None: expected a list of names"),
        ({"losses": [None]}, "losses=None: expected a name or a dict"),
    ],
)
def test_bad_values_are_refused_at_construction(values, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig(**{**BASE, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"router": "liner"},
            "unknown router 'liner': did you mean 'linear'. valid: cosine, expert_choice, hash, linear, soft",
        ),
        ({"router": {"name": "linear", "top_k": 9}}, "top_k=9"),
        (
            {"expert": "mpl"},
            "unknown expert 'mpl': did you mean 'mlp'. valid: constant, copy, glu, glu_dropout, mlp, .*zero",
        ),
        (
            {"expert": {"name": "mlp", "init_sd": 1}},
            "expert 'mlp': unknown option 'init_sd'; did you mean 'init_std'",
        ),
        ({"expert": []}, "expert counts sum to 0, but num_experts=4"),
        ({"activation": "gleu"}, "activation='gleu' is unknown; choose one of"),
        ({"combine": "summ"}, "unknown combine 'summ': did you mean 'sum'"),
        (
            {"combine": {"name": "scaled", "scael": 1}},
            "combine 'scaled': unknown option 'scael'; did you mean 'scale'",
        ),
        ({"losses": ["balnce"]}, "unknown loss 'balnce': did you mean 'balance'"),
    ],
)
def test_bad_parts_are_refused_by_build(values, message):
    config = MoEConfig(**{**BASE, **values})
    with pytest.raises(ConfigError, match=message):
        config.build()


def test_errors_are_of_one_family():
    assert issubclass(ConfigError, FlexpertError)
    assert issubclass(ConfigError, ValueError)


def test_parts_or_a_config():
    layer = make("default").build()
    with pytest.raises(ConfigError, match="give either config or parts, not both"):
        MoE(layer.config, router=layer.router)
    with pytest.raises(ConfigError, match="MoE needs a config, or a router and experts"):
        MoE(router=layer.router)
    x = torch.randn(3, 6)
    assert torch.equal(MoE(router=layer.router, experts=layer.experts)(x), layer(x))
