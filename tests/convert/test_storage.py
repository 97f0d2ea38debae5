"""Converted models saved and loaded; what is damaged, foreign or of another conversion is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flexpert import CheckpointError, ConfigError
from flexpert.convert import Clone, Granular, Slice, convert, load, measure_model, save
from flexpert.convert import storage as storage_module


def edit(folder, change, name="config.json"):
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def rewrite(folder, change, metadata=None):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata=metadata or {"format": "pt"})


def test_round_trip(case, tmp_path):
    base = copy.deepcopy(case.model)
    convert(case.model, case.glob, Clone(num_experts=3, top_k=2))
    want = case.outputs(case.model)
    save(case.model, tmp_path / "m")
    state = torch.get_rng_state()
    plain = not hasattr(case.model, "config")
    model = load(tmp_path / "m", base) if plain else load(str(tmp_path / "m"))
    assert torch.equal(state, torch.get_rng_state())
    assert type(model) is type(case.model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(case.outputs(model), want)
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in case.model.named_parameters()
    ]
    assert measure_model(model) == measure_model(case.model)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_config_counts_right(make_case, tmp_path):
    case = make_case("llama")
    report = convert(case.model, case.glob, Clone(num_experts=4, top_k=2))
    save(case.model, tmp_path / "m")
    entry = json.loads((tmp_path / "m/config.json").read_text())["flexpert"]
    assert entry["num_params"] == report.after.params == load(tmp_path / "m").num_parameters()
    assert entry["num_active_params"] == report.after.active_params < report.after.params


def test_dtypes_tied_weights_and_shards(make_case, tmp_path):
    case = make_case("qwen3")
    case.model.model.layers.to(torch.bfloat16)
    case.model.model.rotary_emb.float()
    convert(case.model, case.glob, Slice(num_experts=2), settings={"router": {"selection_bias": True}})
    save(case.model, tmp_path / "a")
    case.model.save_pretrained(tmp_path / "b", max_shard_size="4kB")
    assert not (tmp_path / "b/model.safetensors").exists()
    for name in "ab":
        model = load(tmp_path / name)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        for (key, got), want in zip(
            model.state_dict().items(), case.model.state_dict().values(), strict=True
        ):
            assert got.dtype is want.dtype, key
            assert torch.equal(got, want)


def test_what_save_pretrained_writes_can_be_loaded(make_case, tmp_path):
    case = make_case("vit")
    convert(case.model, case.glob, Clone(num_experts=2))
    case.model.save_pretrained(tmp_path / "m", save_original_format=False)
    assert torch.equal(case.outputs(load(tmp_path / "m")), case.outputs(case.model))
    case.model.save_pretrained(tmp_path / "old")  # by other names than the model's own
    with pytest.raises(CheckpointError, match="unexpected: .*as written by flexpert.convert.save"):
        load(tmp_path / "old")


def test_loaded_models_train_and_convert_on(make_case, tmp_path):
    case = make_case("llama")
    convert(case.model, "*.0.mlp", Clone(num_experts=2))
    save(case.model, tmp_path / "m")
    model = load(tmp_path / "m")
    assert all(p.requires_grad for p in model.parameters())
    convert(model, "*.1.mlp", Clone(num_experts=2))
    save(model, tmp_path / "n")
    assert len(load(tmp_path / "n").config.flexpert["layers"]) == 2


def test_saving_is_all_or_nothing(make_case, tmp_path, monkeypatch):
    case = make_case("llama")
    with pytest.raises(ConfigError, match="LlamaForCausalLM is not converted; save a dense model as its own"):
        save(case.model, tmp_path / "m")
    convert(case.model, case.glob, Clone(num_experts=2))

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(storage_module, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            save(case.model, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    save(case.model, tmp_path / "m")
    with pytest.raises(ConfigError, match="m exists; choose another folder, or remove it"):
        save(case.model, tmp_path / "m")


def drop(name):
    return lambda data: data.pop(name)


@pytest.fixture
def saved(make_case, tmp_path):
    """A folder of a converted Llama."""
    case = make_case("llama")
    convert(case.model, case.glob, Clone(num_experts=4, top_k=2))
    save(case.model, tmp_path / "m")
    return tmp_path / "m"


CONFIGS = {
    "dense": (
        drop("flexpert"),
        "is not of a model converted by Flexpert: its config has no entry 'flexpert'",
    ),
    "another format": (lambda d: d["flexpert"].update(format="x"), "no entry 'flexpert' of the format"),
    "newer": (
        lambda d: d["flexpert"].update(version=99),
        "conversion format 99, this Flexpert reads 1; update",
    ),
    "a part missing": (lambda d: d["flexpert"].pop("layers"), "damaged: its entry 'flexpert' cannot be read"),
    "an unknown part": (
        lambda d: d["flexpert"]["layers"]["model.layers.0.mlp"]["moe"].update(expertt="glu"),
        "damaged: .*unknown option 'expertt'",
    ),
    "another routing": (
        lambda d: d["flexpert"]["layers"]["model.layers.0.mlp"]["moe"].update(top_k=1),
        "holds the weights of another conversion than the config beside it",
    ),
    "another model": (
        lambda d: d.update(num_hidden_layers=1),
        "converts model.layers.1.mlp, which .* does not have",
    ),
    "another width": (
        lambda d: d.update(vocab_size=41),
        r"lm_head.weight \(40, 16\) \(expected \(41, 16\)\)",
    ),
    "unknown type": (lambda d: d.update(model_type="alien"), "does not know its model_type 'alien'"),
    "unknown class": (lambda d: d.update(architectures=["Alien"]), "architecture 'Alien' is not known to"),
    "a class that is no class": (
        lambda d: d.update(architectures=["__version__"]),
        "'__version__' is not known",
    ),
    "no class": (drop("architectures"), "architecture '' is not known"),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_do_not_fit(saved, change, message):
    edit(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


EXPERT = "model.layers.0.mlp.experts.w2"
WEIGHTS = {
    "missing": (drop(EXPERT), f"missing: {EXPERT}"),
    "unexpected": (lambda t: t.update(other=torch.zeros(1)), "unexpected: other"),
    "another shape": (
        lambda t: t.update({EXPERT: torch.zeros(3, 16, 24)}),
        r"w2 \(3, 16, 24\) \(expected \(4, 16, 24\)\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_weights_of_another_conversion_of_equal_shapes(saved, make_case, tmp_path):
    """Granular of copies uncut has the very tensors that clones have."""
    case = make_case("llama")
    convert(case.model, case.glob, Granular(copies=4, pieces_per_copy=1))
    save(case.model, tmp_path / "other")
    (tmp_path / "other/model.safetensors").replace(saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="weights of another conversion"):
        load(saved)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 20), "model.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors, nor"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "is not of a model converted by Flexpert"),
        (
            lambda f: (f / "config.json").unlink(),
            "holds no model: it has neither config.json nor flexpert.json",
        ),
    ],
)
def test_damaged_folders(saved, spoil, message):
    spoil(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_an_index_stays_in_its_folder(saved):
    (saved / "model.safetensors").rename(saved.parent / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names outside.safetensors, which is not in its folder"):
        load(saved)


def test_nothing_is_changed_by_a_refused_checkpoint(make_case, tmp_path):
    case = make_case("plain")
    base = copy.deepcopy(case.model)
    convert(case.model, case.glob, Clone(num_experts=2))
    save(case.model, tmp_path / "m")
    rewrite(tmp_path / "m", drop("blocks.0.0.experts.w1"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(CheckpointError, match="missing: blocks.0.0.experts.w1"):
        load(tmp_path / "m", base)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_models_without_a_config_are_asked_for(make_case, tmp_path):
    case = make_case("plain")
    convert(case.model, case.glob, Clone(num_experts=2))
    save(case.model, tmp_path / "m")
    with pytest.raises(
        ConfigError, match=r"without a config of its own: give load\(folder, model\) the dense"
    ):
        load(tmp_path / "m")
    with pytest.raises(ConfigError, match="model is converted already; give the dense one"):
        load(tmp_path / "m", case.model)
    with pytest.raises(CheckpointError, match="converts blocks.0, blocks.1, which Linear does not have"):
        load(tmp_path / "m", nn.Linear(2, 2))


def test_without_transformers(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"need the package transformers: pip install 'flexpert\[hf\]'"):
        load(saved)
