"""The record of a conversion: plain data, kept where the model's library keeps its own."""

from __future__ import annotations

import json

import pytest
from torch import nn

from flexpert import CheckpointError, ConfigError, MoE, MoEConfig
from flexpert.convert import Clone, Granular, convert
from flexpert.convert.structure import Structure, get_structure, has_config, moe_layers, set_structure


def test_plain_data_and_back(case):
    convert(case.model, case.glob, Granular(copies=2, pieces_per_copy=2))
    structure = get_structure(case.model)
    data = json.loads(json.dumps(structure.to_dict()))
    again = Structure.from_dict(data, "it")
    assert again.layers == structure.layers
    assert again.digest == structure.digest
    assert {(layer.method, layer.pieces) for layer in again.layers.values()} == {("granular", 2)}
    for layer in again.layers.values():
        assert isinstance(case.model.get_submodule(layer.place.layer), MoE)
        assert case.model.get_submodule(layer.place.layer).config == layer.moe


def test_the_digest_is_of_the_layers_alone(make_case):
    digests = set()
    for method in (Clone(num_experts=2), Clone(num_experts=3), Clone(num_experts=3, top_k=2)):
        model = make_case("llama").model
        convert(model, "*.mlp", method)
        digests.add(get_structure(model).digest)
    assert len(digests) == 3
    other = Structure(layers=get_structure(model).layers, sizes={"num_params": 1})
    assert other.digest == get_structure(model).digest


def test_where_it_is_kept(make_case):
    llama, plain = make_case("llama").model, make_case("plain").model
    assert has_config(llama)
    assert not has_config(plain)
    for model, holder in ((llama, llama.config), (plain, plain)):
        assert get_structure(model).layers == {}
        convert(model, "*.1.mlp" if model is llama else "blocks.1", Clone(num_experts=2))
        assert holder.flexpert["format"] == "flexpert-conversion"
        set_structure(model, Structure(layers={}))
        assert not hasattr(holder, "flexpert")


def test_foreign_data():
    for data in (None, [], {"format": "other"}):
        with pytest.raises(CheckpointError, match="it is not of a model converted by Flexpert"):
            Structure.from_dict(data, "it")


def test_moe_layers_by_either_name(make_case):
    model = make_case("gpt2").model
    convert(model, "*.mlp", Clone(num_experts=2))
    names = ["transformer.h.0.mlp.0", "transformer.h.1.mlp.0"]
    assert list(moe_layers(model, "*")) == list(moe_layers(model, "*.mlp")) == names
    assert list(moe_layers(model, "*.1.mlp.0")) == names[1:]
    with pytest.raises(
        ConfigError, match=r"layers='x' names no converted layer; .* there are: transformer.h.0.mlp.0"
    ):
        moe_layers(model, "x")


def test_layers_that_no_conversion_made(make_case):
    moe = MoE(MoEConfig(model_dim=16, hidden_dim=8, num_experts=2))
    assert list(moe_layers(nn.ModuleDict({"moe": moe}), "moe")) == ["moe"]
    llama = make_case("llama").model  # whose config would not know of a change
    llama.model.layers[0].mlp = moe
    with pytest.raises(ConfigError, match="there are: none"):
        moe_layers(llama, "*")
