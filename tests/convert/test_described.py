"""Layers that the model's own config describes: cut, grown, saved and loaded as what they are."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from flexpert import ConfigError, MoE, routing_scope
from flexpert.convert import extract, grow, to_dense
from flexpert.models import MoELanguageForCausalLM, SwinV2MoEForImageClassification, language_preset, preset

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
SMALL = {"moe_intermediate_size": 12, "intermediate_size": 12, "num_experts_per_tok": 2}


def mixtral():
    config = transformers.MixtralConfig(
        **TEXT, intermediate_size=12, num_key_value_heads=1, num_local_experts=4
    )
    return transformers.MixtralForCausalLM(config)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(**TEXT, **SMALL, num_key_value_heads=2, head_dim=8, num_experts=4)
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss():
    """Biases, and weights that are the transposes."""
    config = transformers.GptOssConfig(
        **TEXT, intermediate_size=12, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


def deepseek():
    heads = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    }
    config = transformers.DeepseekV3Config(
        **TEXT, **SMALL, **heads, num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def language():
    sizes = {**TEXT, "num_hidden_layers": 3, "intermediate_size": 24, "expert_hidden_dim": 12}
    config = language_preset(
        "tiny", **sizes, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64
    )
    return MoELanguageForCausalLM(config)


MODELS = {make.__name__: make for make in (mixtral, qwen3_moe, gpt_oss, deepseek, language)}
IDS = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS)
def model(request):
    """Experts and routers that are far apart, and biases that are not 0."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for name, tensor in model.state_dict().items():
        if any(part in name for part in ("experts", "gate.", "router", "correction")):
            tensor.copy_(torch.randn(tensor.shape) * (0.1 if "correction" in name else 0.4))
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def forbid(model, kept):
    """The same model in which no token may choose the other experts."""
    for module in model.modules():
        router = module._modules.get("gate", module._modules.get("router"))
        if "experts" not in module._modules or router is None:
            continue
        for name in ("e_score_correction_bias", "selection_bias"):
            if (bias := getattr(router, name, None)) is not None:
                bias[[e for e in range(4) if e not in kept]] = -1e4
                break
        else:
            drop = torch.full((4,), -1e4)
            drop[kept] = 0
            linear = torch.nn.functional.linear
            router.forward = _masked(router, drop, linear)
    return model


def _masked(router, drop, linear):
    """A bias on the logits, put where the router's own forward multiplies by its weight."""
    original = type(router).forward

    def forward(hidden, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.nn.functional.linear", lambda x, w, b=None: linear(x, w, b) + drop)
            return original(router, hidden, *args, **kwargs)

    return forward


def test_extracting_is_forbidding_the_others(model, tmp_path):
    want = logits(forbid(copy.deepcopy(model), [0, 2, 3]))
    parameters, count = dict(model.named_parameters()), model.num_parameters()
    report = extract(model, "*", [0, 2, 3])
    assert not report.exact
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert (report.before.params, report.after.params) == (count, model.num_parameters())
    assert report.after.active_params < report.after.params
    assert all(p is parameters[n] for n, p in model.named_parameters() if p.shape == parameters[n].shape)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.num_parameters() == report.after.params
    assert torch.equal(logits(again), logits(model))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 11)


def test_growing_has_copies(model):
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grow(model, "*", 6, noise=0.1)
    for name, tensor in model.state_dict().items():
        if tensor.shape == old[name].shape:
            assert torch.equal(tensor, old[name])
            continue
        assert torch.equal(tensor[:4], old[name])
        if name.endswith(("gate.weight", "router.weight")):
            shift = tensor[4:] - old[name][:2]
            assert 0.02 < float(shift.std() / old[name].std()) < 0.3
        else:
            assert torch.equal(tensor[4:], old[name][:2]), name
    assert logits(model).isfinite().all()


def test_growing_both_e_and_k_is_exact_where_weights_are_renormalised():
    torch.manual_seed(0)
    model = mixtral().eval()
    want = logits(model)
    report = grow(model, "*", 8, top_k=4, noise=0.0)
    assert report.exact
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (8, 4)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert report.before.active_params < report.after.active_params
    assert report.layers["model.layers.0.mlp"].kind == "4 experts, top-2 -> 8 experts, top-4"


def test_the_most_used_of_each_layer_stay():
    torch.manual_seed(0)
    model = language().eval()
    with routing_scope(model) as scope:
        logits(model)
    rows = {
        layer: model.get_submodule(layer).router.weight.detach()[
            stats.load_E.argsort(descending=True, stable=True)[:2].sort().values
        ]
        for (layer, _), stats in scope.stats.items()
    }
    extract(model, "*", 2, stats=scope.stats)
    assert len(rows) == 2
    for layer, weight in rows.items():
        assert torch.equal(model.get_submodule(layer).router.weight, weight)


def test_images_too(tmp_path):
    sizes = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "pretrained_window_sizes": [0, 0]}
    model = SwinV2MoEForImageClassification(preset("tiny", **sizes, num_experts=4)).eval()
    extract(model, "*", [1, 3])
    assert {m.experts.num_experts for m in model.modules() if isinstance(m, MoE)} == {2}
    model.save_pretrained(tmp_path)
    again = SwinV2MoEForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images).logits, model(pixel_values=images).logits)


def test_errors():
    torch.manual_seed(0)
    model = mixtral()
    state = model.state_dict()
    for call, message in (
        (lambda: extract(model, "*.0.mlp", [0]), r"leaves out model.layers.1.mlp; .* so name them all: '\*'"),
        (lambda: extract(model, "*", [0, 4]), r"experts=\[0, 4\]: expected different indices in 0..3"),
        (lambda: grow(model, "*", 4), "num_experts=4: model.layers.0.mlp has 4; expected more"),
        (lambda: to_dense(model), r"no dense form; extract\(model, '\*', \[i\], top_k=1\) keeps one expert"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert model.config.num_local_experts == 4
    assert all(model.state_dict()[name] is not None for name in state)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_heads": 2, "num_layers": 2, "num_experts": 4}
    config = transformers.SwitchTransformersConfig(**sizes, vocab_size=50, num_sparse_encoder_layers=1)
    with pytest.raises(
        ConfigError, match="keeps every expert as modules of its own .*only experts in stacked"
    ):
        extract(transformers.SwitchTransformersForConditionalGeneration(config), "*", [0, 1])
