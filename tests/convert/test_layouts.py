"""Choosing MLPs, and saying what was found where a choice names none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexpert import ConfigError, MoE, MoEConfig
from flexpert.convert import choose_mlps, find_mlps


def names(model, layers):
    return list(choose_mlps(model, layers))


def test_globs_lists_and_predicates(make_case):
    case = make_case("llama")
    both = ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert names(case.model, "*") == names(case.model, case.glob) == both
    assert names(case.model, "model.layers.1.*") == both[1:]
    assert names(case.model, ["*.1.mlp", "*.0.mlp"]) == both
    assert (
        names(case.model, lambda name, module: type(module).__name__ == "LlamaMLP" and ".0." in name)
        == both[:1]
    )


def test_moe_layers_are_not_looked_into():
    moe = MoE(MoEConfig(model_dim=4, hidden_dim=8, num_experts=2, num_shared_experts=1))
    model = nn.ModuleDict({"moe": moe, "mlp": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))})
    assert list(find_mlps(model)) == ["mlp"]


def test_a_glob_that_matches_nothing_lists_the_mlps(make_case):
    message = (
        r"layers='layers.\*' matches no module; MLPs found in this LlamaForCausalLM: model.layers.0.mlp "
        r"\(gated 16 -> 24 -> 16, silu\), model.layers.1.mlp"
    )
    with pytest.raises(ConfigError, match=message):
        names(make_case("llama").model, "layers.*")
    with pytest.raises(ConfigError, match="matches no module; MLPs found in this Linear: none"):
        names(nn.Linear(2, 2), "*")


def test_every_glob_of_a_list_must_match(make_case):
    with pytest.raises(ConfigError, match=r"layers='\*.9.mlp' matches no module"):
        names(make_case("llama").model, ["*.0.mlp", "*.9.mlp"])


def test_an_unknown_layout_says_what_is_there_and_what_to_do(make_case):
    message = (
        r"layers='\*.self_attn' matches no MLP of a known layout, only model.layers.0.self_attn "
        r"\(LlamaAttention of q_proj: Linear, .*known are .*name one of these, or write the module as nn.Seq"
    )
    with pytest.raises(ConfigError, match=message):
        names(make_case("llama").model, "*.self_attn")


class Odd(nn.Sequential):
    def forward(self, x):
        return torch.sin(super().forward(x))


def test_a_near_mlp_says_why_it_is_none():
    model = nn.ModuleDict({"odd": Odd(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))})
    with pytest.raises(
        ConfigError, match=r"only odd \(it has Odd of 0: Linear.*, and computes something else"
    ):
        names(model, "odd")
    with pytest.raises(ConfigError, match="layers=the predicate matches no MLP of a known layout, only odd"):
        names(model, lambda name, module: isinstance(module, Odd))


def test_weights_that_are_tied_are_not_parted(make_case):
    model = make_case("plain").model
    model.blocks[1] = model.blocks[0]
    with pytest.raises(
        ConfigError, match="blocks.0.0.weight and blocks.1.0.weight are one parameter, which a conv"
    ):
        names(model, "blocks.0")
    model = make_case("plain").model
    model.blocks[1][2].bias = model.blocks[0][2].bias
    with pytest.raises(ConfigError, match="blocks.0.2.bias and blocks.1.2.bias are one parameter"):
        names(model, "blocks.1")
