from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from flexpert import CheckpointError, ConfigError, InputError, MoE, RoutingContext, routing_scope
from flexpert.models import MoELanguageConfig, MoELanguageForCausalLM, language_preset

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "expert_hidden_dim": 10,
    "max_position_embeddings": 64,
}


def small(**changes):
    torch.manual_seed(0)
    return MoELanguageForCausalLM(language_preset("tiny", **{**SMALL, **changes}))


def ids(batch=2, length=12, seed=1):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_presets_active_width_is_that_of_its_dense_twin():
    moe, twin = (MoELanguageForCausalLM(language_preset("tiny", num_experts=count)) for count in (16, 0))
    routers = sum(module.router.weight.numel() for module in moe.modules() if isinstance(module, MoE))
    assert moe.num_active_parameters() - routers == twin.num_parameters() == twin.num_active_parameters()
    assert moe.num_parameters() > 2 * twin.num_parameters()


def test_experts_stand_where_the_config_says():
    model = small(first_dense_layers=2)
    assert [isinstance(layer.mlp, MoE) for layer in model.model.layers] == [False, False, True]
    assert not any(isinstance(module, MoE) for module in small(num_experts=None).modules())


def test_all_new_weights_have_the_models_spread():
    model = small(hidden_size=64, expert_hidden_dim=64, initializer_range=0.01)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert float(parameter.detach().std()) == pytest.approx(0.01, rel=0.2), name


def test_the_loss_is_cross_entropy_and_the_weighted_balance():
    model, tokens = small(balance_weight=0.5, balance_loss="balance").train(), ids()
    with routing_scope(model) as scope:
        output = model(tokens, labels=tokens)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.aux_loss, 0.5 * scope.losses["balance"].mean())
    torch.testing.assert_close(output.loss, expected + output.aux_loss)
    assert scope.losses["balance"].shape == (2,)
    assert model(tokens, labels=tokens, return_dict=False)[0] == output.loss
    assert model.eval()(tokens).aux_loss is None


def test_the_cache_gives_what_whole_sequences_give():
    model, tokens = small().eval(), ids(batch=1)
    text = model.generate(tokens, max_new_tokens=10, do_sample=False)
    for length in range(tokens.shape[1], text.shape[1]):
        assert model(text[:, :length]).logits[0, -1].argmax() == text[0, length]


def test_padding_is_neither_routed_nor_felt():
    model, tokens = small(capacity_factor=1.0).eval(), ids(batch=1)
    padded = torch.cat([torch.full((1, 5), 7), tokens], 1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 12)], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with routing_scope(model) as scope:
        expected = model(tokens).logits
    with routing_scope(model, context=RoutingContext(top_k=2)) as padded_scope:
        logits = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[:, 5:], expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(scope.stats.values(), padded_scope.stats.values(), strict=True):
        assert other.tokens == one.tokens == 12
        assert other.selected_E.equal(one.selected_E)


def test_a_recomputation_sees_the_mask_of_its_own_call():
    tokens, gradients = ids(), []
    masks = torch.ones(2, 2, 12, dtype=torch.int64)
    masks[0, 0, :7] = 0
    masks[1, 1, :3] = 0
    for checkpointing in (False, True):
        model = small(capacity_factor=0.5, balance_weight=0.1).double().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        losses = [model(tokens, attention_mask=mask, labels=tokens).loss for mask in masks]
        (losses[0] + losses[1]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("labels", [False, True])
def test_no_sample_gives_no_logits_and_a_graph(labels):
    model, tokens = small().train(), ids()[:0]
    output = model(tokens, labels=tokens if labels else None)
    assert output.logits.shape == (0, 12, 256)
    total = output.loss if labels else output.logits.sum()
    total.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "experts" in name]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_checkpointing_changes_no_gradient():
    tokens, gradients = ids(), []
    for checkpointing in (False, True):
        model = small(balance_weight=0.1).double().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_saved_model_comes_back_by_its_folder_alone(tmp_path):
    model, tokens = small(router="linear").eval(), ids()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is MoELanguageForCausalLM
    assert again(tokens).logits.equal(model(tokens).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoELanguageConfig)
    card = (tmp_path / "README.md").read_text()
    assert "6 of width 10, top-2, and 1 shared" in card
    assert f"{model.num_active_parameters():,}" in card


def test_weights_of_another_model_are_refused(tmp_path):
    small().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("experts.w1"))
    save_file({**weights, name: weights[name][:3].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="mismatched"):
        MoELanguageForCausalLM.from_pretrained(tmp_path)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing.*experts\.w1"):
        MoELanguageForCausalLM.from_pretrained(tmp_path)


def test_the_config_says_everything_a_reader_needs(tmp_path):
    small().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "flexpert_moe_lm"
    assert {key: stored[key] for key in SMALL} == SMALL


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_experts_per_tok": 7}, "top_k=7"),
        ({"first_dense_layers": 4}, "first_dense_layers=4"),
        ({"router": "nearest"}, "nearest"),
        ({"experts": 3}, "experts"),
        ({"hidden_size": 25}, "25"),
    ],
)
def test_bad_settings_are_refused_when_the_config_is_made(changes, match):
    with pytest.raises(ConfigError, match=match):
        language_preset("tiny", **{**SMALL, **changes})


def test_an_unknown_preset_and_no_input_are_refused():
    with pytest.raises(ConfigError, match="'huge'"):
        language_preset("huge")
    with pytest.raises(InputError, match="input_ids"):
        small()()
