"""MoE to dense: the dense model again, by the mean, by use, or one copy of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flexpert import CheckpointError, ConfigError, InputError, MoE, MoEConfig, routing_scope
from flexpert.convert import Clone, Granular, Importance, Slice, convert, to_dense
from flexpert.experts import SharedExpert

METHODS = {
    "clone": Clone(num_experts=3, top_k=2),
    "granular": Granular(copies=3, pieces_per_copy=4),
    "slice": Slice(num_experts=3),
    "importance": Importance(num_experts=5, num_shared=3),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_there_and_back_is_the_dense_model(case, method):
    dense = copy.deepcopy(case.model)
    config = copy.deepcopy(getattr(dense, "config", None))
    convert(case.model, case.glob, method, calibration=[case.batch])
    report = to_dense(case.model, dense=None if config else dense)
    assert report.exact
    assert [type(m) for m in case.model.modules()] == [type(m) for m in dense.modules()]
    state = case.model.state_dict()
    assert state.keys() == dense.state_dict().keys()
    if method.name == "importance":  # neurons in another order
        torch.testing.assert_close(case.outputs(case.model), case.outputs(dense))
    else:
        for name, tensor in dense.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-7)
    if config:
        assert case.model.config.to_dict() == config.to_dict()
    assert report.before.params > report.after.params == sum(p.numel() for p in dense.parameters()) or (
        method.name in ("slice", "importance")
    )


def spread(model):
    """Experts that are unlike."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, MoE):
            for parameter in module.experts.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def converted(make_case, method):
    case = make_case("llama")
    convert(case.model, case.glob, method, calibration=[case.batch])
    spread(case.model)
    return case, {name: p.detach().clone() for name, p in case.model.named_parameters()}


def test_mean_usage_and_keep(make_case):
    for how, shares in (("mean", [1 / 4] * 4), ("keep", [0, 0, 1, 0]), ("usage", None)):
        case, old = converted(make_case, Clone(num_experts=4, top_k=2))
        with routing_scope(case.model) as scope:
            case.outputs(case.model)
            case.outputs(case.model)
        report = to_dense(case.model, how=how, keep=2 if how == "keep" else 0, stats=scope.stats)
        assert not report.exact
        assert "outputs differ by" in report.why_not_exact
        for i, layer in enumerate(case.model.model.layers):
            load = scope.stats[f"model.layers.{i}.mlp", 0].load_E
            weights = torch.tensor(shares, dtype=torch.float32) if shares else load / load.sum()
            w1 = torch.einsum("e,egfd->gfd", weights, old[f"model.layers.{i}.mlp.experts.w1"])
            torch.testing.assert_close(
                torch.stack([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]), w1
            )
            b2 = torch.einsum("e,ed->d", weights, old[f"model.layers.{i}.mlp.experts.b2"])
            torch.testing.assert_close(layer.mlp.down_proj.bias, b2)


def test_copies_of_pieces_are_joined_then_weighed(make_case):
    case, old = converted(make_case, Granular(copies=2, pieces_per_copy=3))
    with routing_scope(case.model) as scope:
        case.outputs(case.model)
    to_dense(case.model, how="usage", stats=scope.stats)
    load = scope.stats["model.layers.0.mlp", 0].load_E.view(2, 3).sum(1)
    w2 = old["model.layers.0.mlp.experts.w2"].view(2, 3, 16, 8)
    want = torch.einsum("c,cpdf->dpf", load / load.sum(), w2).flatten(1)
    torch.testing.assert_close(case.model.model.layers[0].mlp.down_proj.weight.detach(), want)


def test_some_layers_only(make_case):
    case, _ = converted(make_case, Clone(num_experts=2))
    case.model.train()
    to_dense(case.model, "*.0.mlp")
    assert [type(layer.mlp).__name__ for layer in case.model.model.layers] == ["LlamaMLP", "MoE"]
    assert case.model.model.layers[0].mlp.training
    assert list(case.model.config.flexpert["layers"]) == ["model.layers.1.mlp"]
    assert case.model.config.flexpert["num_params"] == case.model.num_parameters()
    to_dense(case.model)
    assert not hasattr(case.model.config, "flexpert")
    assert not any(p.is_meta for p in case.model.parameters())


def test_dropout_comes_back(make_case):
    case = make_case("gpt2")
    convert(case.model, case.glob, Clone(num_experts=2))
    to_dense(case.model)
    assert case.model.transformer.h[0].mlp.dropout.p == 0.1


@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_that_never_was_dense(gated):
    config = MoEConfig(
        model_dim=6,
        hidden_dim=8,
        num_experts=3,
        expert="glu" if gated else "mlp",
        expert_bias=True,
        num_shared_experts=2,
        router={"name": "linear", "straight_through": True},
    )
    model = nn.Sequential(MoE(config), nn.Linear(6, 2))
    bank, shared = model[0].experts, model[0].shared
    x = torch.randn(4, 6)
    want = SharedExpert(count=1, gated=gated, gate=False, model_dim=6, hidden_dim=8, bias=True)
    for name, parameter in want.expert.named_parameters():
        parameter.data = bank.get_parameter(name).detach()[1:2]
    y = want(x) + shared(x)
    to_dense(model, "0", how="keep", keep=1)
    assert isinstance(model[0], SharedExpert)
    torch.testing.assert_close(model[0](x), y)


def test_errors(make_case):
    case, _ = converted(make_case, Clone(num_experts=2))
    for options, error, message in (
        ({"how": "best"}, ConfigError, "how='best': expected one of mean, usage, keep"),
        (
            {"how": "keep", "keep": 2},
            ConfigError,
            r"keep=2: model.layers.0.mlp has copies 0..1 \(2 experts of 24",
        ),
        (
            {"how": "usage"},
            InputError,
            "stats has nothing of model.layers.0.mlp; give the stats of a routing_sc",
        ),
        ({"layers": "nope"}, ConfigError, "layers='nope' names no converted layer"),
    ):
        with pytest.raises(error, match=message):
            to_dense(case.model, **options)
    other = make_case("llama").model
    other.model.layers[0].mlp.down_proj = nn.Linear(25, 16)
    kinds = [type(module) for module in case.model.modules()]
    with pytest.raises(CheckpointError, match=r"down_proj of the dense model has a weight \(16, 25\)"):
        to_dense(case.model, dense=other)
    assert [type(module) for module in case.model.modules()] == kinds


def test_banks_and_shared_experts_that_no_mlp_can_hold():
    gate = MoE(MoEConfig(model_dim=6, hidden_dim=8, num_experts=2, num_shared_experts=1, shared_gate=True))
    with pytest.raises(ConfigError, match="0 has a shared expert that is gated or of another kind"):
        to_dense(nn.Sequential(gate))
    zero = MoE(MoEConfig(model_dim=6, hidden_dim=8, num_experts=2, expert="zero"))
    with pytest.raises(
        ConfigError, match="0 has ZeroExperts; expected a bank of equal experts, 'mlp' or 'glu'"
    ):
        to_dense(nn.Sequential(zero))
