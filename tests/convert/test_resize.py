"""More experts and fewer: which outputs stay, which rows and weights are whose."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flexpert import ConfigError, InputError, MoE, MoEConfig, routing_scope
from flexpert.convert import Clone, Granular, Slice, convert, extract, grow, load, save


def layer(**settings):
    config = {"model_dim": 6, "hidden_dim": 8, "num_experts": 4, "expert_bias": True, **settings}
    torch.manual_seed(0)
    model = nn.Sequential(MoE(MoEConfig(**config)))
    nn.init.normal_(model[0].router.weight)
    return model


STRAIGHT = {"name": "linear", "straight_through": True}


def test_growing_with_top_1_keeps_the_outputs_where_copies_are_alike(make_case):
    case = make_case("llama")
    want = case.outputs(case.model)
    convert(case.model, case.glob, Clone(num_experts=2))
    report = grow(case.model, case.glob, 5)
    assert report.exact
    assert case.model.model.layers[0].mlp.experts.num_experts == 5
    torch.testing.assert_close(case.outputs(case.model), want, rtol=1e-4, atol=1e-5)
    entry = case.model.config.flexpert
    assert entry["layers"]["model.layers.0.mlp"]["moe"]["num_experts"] == 5
    assert entry["num_params"] == case.model.num_parameters() == report.after.params


def test_growing_unlike_experts_and_k_by_one_factor_is_exact_without_noise():
    model = layer(top_k=2, renormalize=True)
    x = torch.randn(50, 6)
    want = model(x)
    assert grow(model, "0", 12, top_k=6, noise=0.0).exact
    torch.testing.assert_close(model(x), want)


def test_growing_unlike_experts_otherwise_says_so():
    model = layer(top_k=2, renormalize=True)
    report = grow(model, "0", 6)
    assert not report.exact
    assert report.layers["0"].difference > 1e-3
    assert report.layers["0"].kind == "4 experts of 8, top-2 -> 6 experts of 8, top-2"


def test_whose_weights_and_rows_the_new_ones_are():
    model = layer(router={**STRAIGHT, "selection_bias": True, "learned_noise": True})
    moe = model[0]
    nn.init.normal_(moe.router.noise_weight)
    moe.router.selection_bias.normal_()
    old = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    with routing_scope(model) as scope:
        model(torch.randn(200, 6))
    order = scope.stats["0", 0].load_E.argsort(descending=True, stable=True).tolist()
    grow(model, "0", 6, stats=scope.stats, noise=0.1)
    assert model[0] is moe
    sources = [0, 1, 2, 3, *order[:2]]
    new = moe.state_dict()
    for name, tensor in old.items():
        want = tensor[sources]
        if name == "router.weight":
            assert torch.equal(new[name][:4], want[:4])
            shift = (new[name] - want)[4:]
            assert 0.02 < float(shift.std() / tensor.std()) < 0.3
        else:
            assert torch.equal(new[name], want), name


def test_pieces_grow_by_whole_copies(make_case):
    case = make_case("llama")
    want = case.outputs(case.model)
    convert(case.model, case.glob, Granular(copies=2, pieces_per_copy=3))
    assert grow(case.model, case.glob, 12).exact
    rows = case.model.model.layers[0].mlp.router.weight.detach().view(4, 3, -1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert len({tuple(row.tolist()) for row in rows[:, 0]}) == 4
    torch.testing.assert_close(case.outputs(case.model), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ConfigError, match=r"num_experts=13: .* expected more, and a multiple of the 3 pieces"
    ):
        grow(case.model, case.glob, 13)


def test_straight_through_weights_keep_their_sum(make_case):
    case = make_case("llama")
    convert(case.model, case.glob, Clone(num_experts=2))
    assert grow(case.model, case.glob, 4, top_k=2).exact
    assert case.model.model.layers[0].mlp.router.weight_rule.scale == 0.5


def test_extracting_keeps_what_is_named():
    model = layer(top_k=2, renormalize=True)
    before = copy.deepcopy(model[0])
    report = extract(model, "0", [3, 1])
    assert model[0].experts.num_experts == 2
    assert torch.equal(model[0].experts.w1, before.experts.w1[[3, 1]])
    assert torch.equal(model[0].router.weight, before.router.weight[[3, 1]])
    assert report.after.params < report.before.params
    x = torch.randn(9, 6)
    scores = (x @ before.router.weight[[3, 1]].T).softmax(-1).detach()
    outputs = [
        before.experts.w2[e] @ nn.functional.gelu(before.experts.w1[e] @ x.T + before.experts.b1[e][:, None])
        + before.experts.b2[e][:, None]
        for e in (3, 1)
    ]
    want = sum(scores[:, i : i + 1] * y.T for i, y in enumerate(outputs))
    torch.testing.assert_close(model(x), want)


def test_extracting_the_most_used():
    model = layer()
    with routing_scope(model) as scope:
        model(torch.randn(300, 6))
    load_E = scope.stats["0", 0].load_E
    row = model[0].router.weight[int(load_E.argmax())].clone()
    extract(model, "0", 1, stats=scope.stats)
    assert torch.equal(model[0].router.weight, row[None])


def test_dropping_what_no_token_wants_is_exact():
    model = layer(router=STRAIGHT)
    with torch.no_grad():
        model[0].router.weight[2:] = 0
        model[0].router.weight[0] = -model[0].router.weight[1]  # one of the first two is always above 0
    assert extract(model, "0", [0, 1]).exact


def test_slices_are_dropped_with_their_share(make_case):
    case = make_case("llama")
    convert(case.model, case.glob, Slice(num_experts=4))
    report = extract(case.model, case.glob, [0, 2])
    assert not report.exact
    moe = case.model.model.layers[0].mlp
    assert (moe.router.top_k, moe.router.weight_rule.scale) == (2, 2.0)


def test_a_resized_model_saves_and_loads(make_case, tmp_path):
    case = make_case("bert")
    convert(case.model, case.glob, Clone(num_experts=4, top_k=2))
    extract(case.model, "*.0.*", [1, 2, 3])
    grow(case.model, "*.1.*", 6)
    save(case.model, tmp_path / "m")
    assert torch.equal(case.outputs(load(tmp_path / "m")), case.outputs(case.model))


def test_errors(make_case):
    case = make_case("llama")
    convert(case.model, "*.0.mlp", Granular(copies=2, pieces_per_copy=2))
    convert(case.model, "*.1.mlp", Slice(num_experts=4))
    kinds = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    for call, error, message in (
        (
            lambda m: grow(m, "*.0.mlp", 4),
            ConfigError,
            "num_experts=4: .* expected more, and a multiple of the 2",
        ),
        (
            lambda m: grow(m, "*.1.mlp", 8),
            ConfigError,
            "slices of one MLP, and copies of a slice would be added",
        ),
        (lambda m: grow(m, "*.0.mlp", 8, top_k=9), ConfigError, "top_k=9: expected an integer"),
        (lambda m: grow(m, "*.0.mlp", 8, noise=-1), ConfigError, "noise=-1"),
        (
            lambda m: extract(m, "*.0.mlp", [0, 4]),
            ConfigError,
            r"experts=\[0, 4\]: expected different indices in 0..3",
        ),
        (lambda m: extract(m, "*.0.mlp", []), ConfigError, "expected different indices"),
        (lambda m: extract(m, "*.0.mlp", [1, 2]), ConfigError, "copies of 2 pieces each; keep whole copies"),
        (lambda m: extract(m, "*.0.mlp", 5), ConfigError, "experts=5: expected 1..4"),
        (lambda m: extract(m, "*.0.mlp", 2), InputError, "stats has nothing of model.layers.0.mlp"),
    ):
        with pytest.raises(error, match=message):
            call(case.model)
    state = case.model.state_dict()
    assert state.keys() == kinds.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in kinds.items())
    with pytest.raises(
        ConfigError, match="the router is a LinearExpertChoice; expected a linear or cosine one"
    ):
        grow(
            nn.Sequential(MoE(MoEConfig(model_dim=6, hidden_dim=8, num_experts=2, router="expert_choice"))),
            "0",
            4,
        )
