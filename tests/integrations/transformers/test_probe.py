"""What the probe sees of routers: of every class, and of whole models."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from flexpert import ConfigError, InputError, RoutingContext
from flexpert.integrations.transformers import RouterProbe, bias_balancer, enable
from flexpert.integrations.transformers.bias import find_bias
from flexpert.integrations.transformers.blocks import blocks_of
from flexpert.integrations.transformers.scores import score_of
from flexpert.testing import assert_close
from tests.integrations.transformers.models import checkpoint
from tests.integrations.transformers.zoo import D, block_classes, build_block, of_this_release

# Blocks that are whole decoder layers, need more than tokens, or do not build; their routers are tried alone.
NOT_ALONE = {
    "DeepseekV4SparseMoeBlock": ("DeepseekV4TopKRouter", "its first layers choose by token id"),
    "DiffusionGemmaDecoderTextLayer": ("DiffusionGemmaTextRouter", "is a decoder layer"),
    "DiffusionGemmaEncoderTextLayer": ("DiffusionGemmaTextRouter", "is a decoder layer"),
    "Gemma4TextDecoderLayer": ("Gemma4TextRouter", "is a decoder layer"),
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": (
        "Qwen3OmniMoeTalkerTextTopKRouter",
        "its config has no shared_expert_intermediate_size",
    ),
}
NOT_PROPORTIONAL = {"PhimoeSparseMoeBlock": "sparsemixer masks the first choice before the second"}
WITHOUT_BIAS = {
    *("AriaTextMoELayer", "Cohere2MoeSparseMoeBlock", "DeepseekOcr2TextMoe", "DeepseekV2Moe"),
    *("FlexOlmoSparseMoeBlock", "FlintSparseMoeBlock", "GptOssMLP", "GraniteMoeHybridMoE", "GraniteMoeMoE"),
    *("GraniteMoeSWAMoE", "GraniteMoeSharedMoE", "HunYuanMoEV1Moe", "JambaSparseMoeBlock"),
    *("MellumSparseMoeBlock", "MiniMaxSparseMoeBlock", "Mistral4MoE", "MistralLarge4TextMoE"),
    *("MixtralSparseMoeBlock", "OlmoeSparseMoeBlock", "OpenAIPrivacyFilterMLP", "PhimoeSparseMoeBlock"),
    *("Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock", "Qwen3NextSparseMoeBlock"),
    *("Qwen3OmniMoeThinkerTextSparseMoeBlock", "Qwen3VLMoeTextSparseMoeBlock", "Qwen3_5MoeSparseMoeBlock"),
    *("Qwen4ExpTextSparseMoeBlock", "UnlimitedOcrTextMoe"),
}


def mixtral(layers=2, experts=4, top_k=2, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(
        num_hidden_layers=layers, num_local_experts=experts, num_experts_per_tok=top_k, vocab_size=50,
        **sizes, **options,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def collapse(model, targets):
    """Let the router of layer i choose expert targets[i] alone, whatever it reads."""
    for layer, target in zip(model.model.layers, targets, strict=True):
        layer.mlp.gate.forward = _Constant(len(layer.mlp.gate.weight), target)


class _Constant:
    def __init__(self, experts, target):
        self.logits_E = torch.zeros(experts)
        self.logits_E[target] = 40.0

    def __call__(self, hidden):
        logits_TE = self.logits_E.expand(hidden.reshape(-1, hidden.shape[-1]).shape[0], -1)
        weights, ids = logits_TE.softmax(-1).topk(1)
        return logits_TE, weights, ids


@of_this_release
@pytest.mark.parametrize("name", sorted(block_classes().keys() - NOT_ALONE.keys()))
def test_every_router(name):
    block = build_block(block_classes()[name])
    (found,) = blocks_of(block)
    assert (find_bias(found) is None) == (name in WITHOUT_BIAS)
    with RouterProbe(block) as probe:
        block(torch.randn(1, 13, D, generator=torch.Generator().manual_seed(0)))
    ((_, routing),) = probe.routings.items()
    assert routing.num_units == 13
    assert routing.logits_TE.shape == routing.probs_TE.shape == (13, 5)
    rows = int(routing.counts_E.sum())
    assert int((routing.aux["ids_TK"] < 5).sum()) == rows
    if name in NOT_PROPORTIONAL:
        return
    # The weights of a token's choices are in proportion to their gate scores: the score is the right one.
    share_N = routing.weight_N / routing.probs_TE[routing.unit_N, routing.expert_N().clamp(max=4)]
    for t in range(13):
        shares = share_N[:rows][routing.unit_N[:rows] == t]
        assert torch.allclose(shares, shares[:1].expand_as(shares), rtol=1e-4)


@of_this_release
@pytest.mark.parametrize("name", ["LongcatFlashMoE", "Step3p7SparseMoeBlock"])
def test_blocks_whose_experts_do_not_use_the_interface(name):
    """They keep their own implementation, and have a bias that nothing updates."""
    folder = {"LongcatFlashMoE": "longcat_flash", "Step3p7SparseMoeBlock": "step3p7"}[name]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    block = build_block(getattr(module, name))
    balancer = bias_balancer(block, rate=0.5)
    with RouterProbe(block) as probe:
        block(torch.randn(1, 13, D, generator=torch.Generator().manual_seed(0)))
    (stats,) = probe.stats.values()
    assert stats.selected_E.sum() == 26
    balancer.observe(probe.stats)
    balancer.step()
    (bias,) = [value for key, value in block.state_dict().items() if "bias" in key and value.dim() == 1][:1]
    assert bias.unique().numel() > 1
    with pytest.raises(ConfigError, match="do not use the interface of transformers"):
        enable(block)


@of_this_release
@pytest.mark.parametrize("name", sorted(NOT_ALONE))
def test_routers_of_other_blocks(name):
    module = importlib.import_module(block_classes()[name].__module__)
    router = build_block(getattr(module, NOT_ALONE[name][0]))
    if hasattr(router, "per_expert_scale"):
        torch.nn.init.ones_(router.per_expert_scale)  # multiplies weights after the choice
    first, weights_TK, ids_TK = router(torch.randn(13, D, generator=torch.Generator().manual_seed(0)))
    probs_TE = score_of(router)[1](first)
    shares_TK = weights_TK / probs_TE.gather(1, ids_TK)
    assert torch.allclose(shares_TK, shares_TK[:, :1].expand_as(shares_TK), rtol=1e-4)


@of_this_release
def test_the_exceptions_are_not_stale():
    assert {*NOT_ALONE, *NOT_PROPORTIONAL, *WITHOUT_BIAS} <= block_classes().keys()


def test_four_layers_collapsed_on_four_experts():
    """The loss of the library averages over layers first and calls them balanced; ours looks at each."""
    model, ids = mixtral(layers=4, top_k=1), torch.randint(50, (2, 8))
    collapse(model, [0, 1, 2, 3])
    with RouterProbe(model) as probe, torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
        ours = probe.loss()
    theirs = load_balancing_loss_func(logits, num_experts=4, top_k=1)
    balanced = load_balancing_loss_func(tuple(torch.zeros(16, 4) for _ in range(4)), 4, top_k=1)
    assert_close(theirs, torch.tensor(1.0), 1e-5)
    assert theirs <= balanced + 1e-5, "what a uniform router scores"
    assert_close(ours, torch.full((4,), 4.0), 1e-5)
    assert all(stats.max_violation == 3 for stats in probe.stats.values())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_is_one_at_balance_for_every_number_of_choices(top_k):
    """Theirs is K there, so that one weight means another thing for each model."""
    scores = torch.stack([torch.arange(6.0).roll(i) for i in range(6)]) / 1e3
    theirs = load_balancing_loss_func((scores,), num_experts=6, top_k=top_k)
    assert_close(theirs, torch.tensor(float(top_k)), 1e-3)
    model = mixtral(experts=6, top_k=top_k, layers=1)
    gate = model.model.layers[0].mlp.gate
    gate.forward = lambda hidden: (scores, *torch.topk(scores.softmax(-1), top_k))
    with RouterProbe(model) as probe:
        model(torch.randint(50, (1, 6)))
    assert_close(probe.loss(), torch.ones(1), 1e-3)


def test_padding_is_neither_counted_nor_weighed():
    model = mixtral()
    ids, mask = torch.randint(1, 50, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    with RouterProbe(model) as probe:
        model(ids, attention_mask=mask)
        padded, loss = probe.stats, probe.loss()
    with RouterProbe(model) as probe:  # right-padded: causal attention hides the end from the rest
        model(ids[:1])
        model(ids[1:, :4])
        apart = probe.stats
    for layer in probe.layers:
        assert padded[layer, 0].tokens == 11
        assert torch.equal(padded[layer, 0].selected_E, sum(apart[layer, i].selected_E for i in (0, 1)))
    assert loss.shape == (2,)
    assert loss.isfinite().all()


def test_the_decoder_of_a_pair_has_a_mask_of_its_own():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
    sizes |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4}
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes, vocab_size=50))
    ids = torch.randint(2, 50, (2, 6))
    masks = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(ids)}
    masks["attention_mask"][1, 4:] = 0
    masks["decoder_attention_mask"][0, 3:] = 0
    with RouterProbe(model) as probe:
        loss = model(input_ids=ids, labels=ids, **masks).loss + probe.loss().mean()
    tokens = {layer.split(".")[0]: int(stats.tokens) for (layer, _), stats in probe.stats.items()}
    assert tokens == {"encoder": 10, "decoder": 9}
    loss.backward()
    routers = [p for name, p in model.named_parameters() if name.endswith("classifier.weight")]
    assert all(p.grad.abs().max() > 0 for p in routers)


def test_generate_counts_each_token_once():
    model = mixtral(layers=1).eval()
    with RouterProbe(model) as probe:
        ids = torch.randint(1, 50, (2, 5))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0  # left padding stays in the mask of every step
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    tokens = [int(stats.tokens) for stats in probe.stats.values()]
    assert tokens == [8, 2, 2, 2]
    merged = probe.stats_of_layers()["model.layers.0.mlp"]
    assert merged.tokens == 14
    assert merged.selected_E.sum() == 28


def gradients(model, ids, micro_batches, checkpointed):
    model.zero_grad()
    if checkpointed:
        checkpoint(model)
    model.train()
    seen = []
    for part in ids.chunk(micro_batches):
        with RouterProbe(model) as probe:
            loss = model(part, labels=part).loss + 0.1 * probe.loss(scope="sequence").mean()
            (loss / micro_batches).backward()
            seen.append(probe.stats)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], seen


def test_recomputation_and_accumulation_change_nothing():
    model, ids = mixtral(), torch.randint(50, (4, 6))
    want, (stats,) = gradients(model, ids, 1, checkpointed=False)
    for micro_batches in (1, 2):
        got, parts = gradients(model, ids, micro_batches, checkpointed=True)
        for one, other in zip(got, want, strict=True):
            assert_close(one, other, 1e-5)
        for key in stats:
            assert torch.equal(sum(part[key].selected_E for part in parts), stats[key].selected_E)


def test_reentrant_checkpointing_is_refused():
    model, ids = mixtral(), torch.randint(50, (2, 6))
    checkpoint(model, use_reentrant=True)
    model.train()
    model.enable_input_require_grads()
    with RouterProbe(model) as probe:
        loss = model(ids, labels=ids).loss + probe.loss().mean()
        with pytest.raises(InputError, match="use_reentrant"):
            loss.backward()


def test_a_probe_changes_nothing_and_leaves_nothing():
    model, ids = mixtral().eval(), torch.randint(50, (2, 6))
    want = model(ids).logits
    with RouterProbe(model) as probe:
        assert torch.equal(model(ids).logits, want)
    model(ids)
    assert len(probe.calls) == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_whole_batch_statistics_and_losses_have_their_parts():
    model, ids = mixtral(), torch.randint(50, (3, 5))
    with RouterProbe(model) as probe:
        model(ids)
    routing, stats = (values["model.layers.1.mlp", 0] for values in (probe.routings, probe.stats))
    probs = routing.logits_TE.softmax(-1)
    assert_close(stats.entropy, torch.special.entr(probs).sum(-1).mean())
    f_E = torch.bincount(probs.topk(2).indices.flatten(), minlength=4) / 30
    assert_close(probe.loss()[1], 4 * (f_E * probs.mean(0)).sum())
    assert_close(probe.loss("z")[1], routing.logits_TE.logsumexp(-1).square().mean())


def test_the_bias_moves_against_the_load_also_where_it_is_narrow():
    model = build_model_with_bias()
    reference = {name: bias.clone() for name, bias in model.state_dict().items() if "correction" in name}
    balancer, ids = bias_balancer(model, rate=0.01), torch.randint(50, (4, 8))
    with RouterProbe(model) as probe:
        for part in ids.chunk(2):
            model(part)
        balancer.observe(probe.stats)
    loads = {layer: stats.selected_E for layer, stats in probe.stats_of_layers().items()}
    balancer.step()
    for name, before in reference.items():
        load_E = loads[name.removesuffix(".gate.e_score_correction_bias")]
        want = before + 0.01 * (load_E.mean() - load_E).sign()
        assert_close(model.state_dict()[name], want)
    narrow = model.to(torch.bfloat16)
    gate = narrow.model.layers[1].mlp.gate
    gate.e_score_correction_bias = torch.full((4,), 8.0, dtype=torch.bfloat16)  # a step of 0.01 is lost there
    balancer = bias_balancer(narrow, rate=0.01)
    with RouterProbe(narrow) as probe:
        narrow(ids)
    for _ in range(20):
        balancer.observe(probe.stats)
        balancer.step()
    load_E = probe.stats_of_layers()["model.layers.1.mlp"].selected_E
    want = 8.0 + 0.2 * (load_E.mean() - load_E).sign()
    assert torch.equal(gate.e_score_correction_bias, want.to(torch.bfloat16))


def build_model_with_bias():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=50, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def test_a_collapsed_model_recovers_by_its_bias():
    model = build_model_with_bias()
    gate = model.model.layers[1].mlp.gate
    with torch.no_grad():
        gate.weight *= 10
        gate.e_score_correction_bias += torch.tensor(
            [2.0, 2.0, 0.0, 0.0]
        )  # every token goes to the first two
    ids, balancer = torch.randint(50, (8, 16)), bias_balancer(model, rate=0.05)
    violations = []
    for _ in range(60):
        with RouterProbe(model) as probe, torch.no_grad():
            model(ids)
        violations.append(float(probe.stats["model.layers.1.mlp", 0].max_violation))
        balancer.observe(probe.stats)
        balancer.step()
    assert violations[0] == 1
    assert max(violations[-10:]) < 0.5


def test_errors_say_what_was_found():
    dense = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
        )
    )
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no routed experts"):
        RouterProbe(dense)
    model = mixtral()
    with pytest.raises(ConfigError, match="MixtralTopKRouter.*have no selection bias.*RouterProbe"):
        bias_balancer(model)
    with pytest.raises(ConfigError, match="score='tanh'.*softmax, sigmoid, given"):
        RouterProbe(model, score="tanh")
    probe = RouterProbe(model)
    with pytest.raises(InputError, match="no router has been called"):
        probe.loss()
    model.model.layers[0].mlp.gate.forward = lambda hidden: hidden
    with pytest.raises(ConfigError, match=r"model.layers.0.mlp.*returned \[\(5, 32\)\]; expected"), probe:
        model(torch.randint(50, (1, 5)))
    context = RoutingContext(mask=torch.ones(3, dtype=torch.bool))
    model = mixtral()
    refused = pytest.raises(InputError, match="context.mask has 3 values.*5 tokens")
    with refused, RouterProbe(model, context=context):
        model(torch.randint(50, (1, 5)))


def test_a_router_that_does_not_tell_its_score_asks_for_it():
    class Router(nn.Module):
        def forward(self, hidden):
            weights, ids = hidden.exp().topk(2)
            return hidden, weights, ids

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = Router(), nn.Identity()

        def forward(self, hidden):
            return self.experts(self.router(hidden)[0])

    with pytest.raises(ConfigError, match="Router cannot be told.*score="):
        RouterProbe(Block())
    with RouterProbe(Block(), score="softmax") as probe:
        probe._model(torch.zeros(3, 4))
    assert math.isclose(probe.stats["", 0].entropy, math.log(4), rel_tol=1e-5)
