"""Token choice: noise, jitter, the selection bias, overrides and what the router refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from flexpert import ConfigError, InputError, MoE, MoEConfig, RoutingContext
from flexpert.experts import MLPExperts
from flexpert.routers import LinearRouter, TokenChoiceRouter
from flexpert.testing import assert_close

D, E = 6, 8


def make_router(seed=0, **options):
    torch.manual_seed(seed)
    return LinearRouter(**{"model_dim": D, "num_experts": E, "top_k": 2, **options})


def tokens(count=50, seed=1):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def at(step=None, **facts):
    return RoutingContext(step=step, **facts)


NOISY = {
    "gate_noise": {"gate_noise": 1.0},
    "learned_noise": {"learned_noise": True},
    "input_jitter": {"input_jitter": 0.3},
    "random": {"selection": "random"},
}


@pytest.mark.parametrize("kind", NOISY)
def test_noise_is_a_function_of_the_step(kind):
    router, x = make_router(**NOISY[kind]), tokens()
    a, b, c = router(x, at(3)), router(x, at(torch.tensor(3))), router(x, at(4))
    assert torch.equal(a.logits_TE, b.logits_TE)
    assert torch.equal(a.unit_N, b.unit_N)
    assert not torch.equal(a.aux["ids_TK"], c.aux["ids_TK"])
    other = make_router(seed=7, **NOISY[kind])  # another layer of the same weights
    other.load_state_dict(router.state_dict())
    assert not torch.equal(other(x, at(3)).aux["ids_TK"], a.aux["ids_TK"])


@pytest.mark.parametrize("kind", ["gate_noise", "learned_noise", "input_jitter"])
def test_noise_only_in_training(kind):
    router, x = make_router(**NOISY[kind]).eval(), tokens()
    routing = router(x, at(3))
    assert_close(routing.logits_TE, F.linear(x, router.weight))
    assert torch.equal(routing.logits_TE, router(x, at(4)).logits_TE)
    assert not torch.equal(router.train()(x, at(3)).logits_TE, routing.logits_TE)


@pytest.mark.parametrize("kind", NOISY)
def test_noise_from_generators(kind):
    router, x = make_router(**NOISY[kind]), tokens()
    before = torch.get_rng_state()
    a, b, c = (router(x, at(generator=torch.Generator().manual_seed(s))) for s in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.unit_N, b.unit_N)
    assert not torch.equal(a.aux["ids_TK"], c.aux["ids_TK"])
    torch.manual_seed(9)
    d = router(x, at())
    torch.manual_seed(9)
    assert torch.equal(d.aux["ids_TK"], router(x, at()).aux["ids_TK"])


def test_gate_noise_is_normal_with_deviation_over_num_experts():
    router, x = make_router(gate_noise=2.0), tokens(4000)
    routing = router(x, at(0))
    clean_TE = F.linear(x, router.weight)
    assert_close(routing.aux["clean_logits_TE"], clean_TE)
    noise = (routing.logits_TE - clean_TE).flatten().double() / (2.0 / E)
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert abs(noise.std() - 1) < 4 / (2 * len(noise)) ** 0.5
    assert routing.aux["noise_std"] == 2.0 / E
    assert_close(routing.probs_TE, routing.logits_TE.softmax(-1))


def test_learned_noise_has_a_softplus_deviation_and_learns():
    router, x = make_router(learned_noise=True), tokens(4000)
    assert router.noise_weight.count_nonzero() == 0
    torch.nn.init.normal_(router.noise_weight)
    routing = router(x, at(0))
    std_TE = (1 + (x @ router.noise_weight.T).exp()).log()
    assert_close(routing.aux["noise_std"], std_TE)
    noise = ((routing.logits_TE - x @ router.weight.T) / std_TE).detach().double()
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5
    routing.weight_N.sum().backward()
    assert router.noise_weight.grad.norm() > 0


def test_input_jitter_multiplies_by_values_in_its_range():
    router = make_router(input_jitter=0.25, num_experts=2, top_k=1, model_dim=1)
    torch.nn.init.ones_(router.weight)
    factor = router(torch.ones(5000, 1), at(0)).logits_TE[:, 0].detach()
    assert factor.min() >= 0.75
    assert factor.max() <= 1.25
    assert factor.min() < 0.76
    assert factor.max() > 1.24
    assert abs(factor.mean() - 1) < 4 * 0.25 / 3**0.5 / 5000**0.5


def test_noise_of_a_token_does_not_depend_on_those_after_it():
    router, x = make_router(gate_noise=1.0), tokens()
    assert_close(router(x[:20], at(2)).logits_TE, router(x, at(2)).logits_TE[:20])


def test_selection_bias_moves_choices_but_not_weights():
    router, x = make_router(selection_bias=True, top_k=1), tokens()
    router.selection_bias[5] = 10.0
    routing = router(x, at())
    assert (routing.aux["ids_TK"] == 5).all()
    assert_close(routing.weight_N, routing.probs_TE[:, 5])
    assert "selection_bias" in router.state_dict()
    assert "selection_bias" not in make_router().state_dict()


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_selection_bias_stays_in_fp32(cast):
    layer = torch.nn.Sequential(make_router(selection_bias=True))
    layer[0].selection_bias[3] = 1 / 3
    layer = cast(layer)
    assert layer[0].weight.dtype != torch.float32
    assert layer[0].selection_bias.dtype == torch.float32
    assert layer[0].selection_bias[3] == torch.tensor(1 / 3)
    assert layer.to("meta")[0].selection_bias.is_meta


def test_selection_bias_is_added_in_full_precision():
    router = make_router(selection_bias=True, scoring="sigmoid", top_k=1).to(torch.bfloat16)
    torch.nn.init.zeros_(router.weight)
    router.selection_bias[2] = 1e-6  # nothing in bf16
    assert (router(tokens().bfloat16(), at()).aux["ids_TK"] == 2).all()


# Overrides -------------------------------------------------------------------------------------------


def test_top_any():
    router, x = make_router(), tokens()
    for top_k in (1, 5, E, 3):
        routing = router(x, at(top_k=top_k))
        assert routing.aux["ids_TK"].shape == (50, top_k)
        want = routing.probs_TE.topk(top_k).indices
        assert torch.equal(routing.aux["ids_TK"], want)
    assert router(x, at()).aux["ids_TK"].shape == (50, 2)
    assert router.top_k == 2


def test_expert_mask_rules_experts_out():
    router, x = make_router(renormalize=False), tokens()
    mask = torch.tensor([True, False] * 4)
    routing = router(x, at(expert_mask=mask, top_k=6))
    ids = routing.aux["ids_TK"]
    assert ((ids == E) | (ids % 2 == 0)).all()
    assert ((ids < E).sum(1) == 4).all()  # the others are absent
    assert (routing.counts_E > 0).tolist() == mask.tolist()
    assert_close(routing.probs_TE.sum(1), torch.ones(50))
    assert routing.probs_TE[:, ~mask].count_nonzero() == 0
    each = router(x, at(expert_mask=mask.expand(50, E), top_k=6))
    assert torch.equal(each.unit_N, routing.unit_N)


def test_a_token_without_an_expert_goes_nowhere():
    router, x = make_router(), tokens()
    mask = torch.ones(50, E, dtype=torch.bool)
    mask[7] = False
    routing = router(x, at(expert_mask=mask))
    assert (routing.aux["ids_TK"][7] == E).all()
    assert routing.counts_E.sum() == 98
    assert not (routing.unit_N[:98] == 7).any()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"top_k": 0}, "top_k=0: expected an integer, 1 <= top_k <= num_experts=8"),
        ({"top_k": 9}, "top_k=9"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_k": True}, "top_k=True"),
        ({"top_k": None}, "top_k=None"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan: expected None"),
        ({"capacity_factor": "1.0"}, "capacity_factor='1.0'"),
        (
            {"expert_mask": torch.ones(E - 1, dtype=torch.bool)},
            r"expert_mask has shape \(7,\); expected \(8,\) or",
        ),
    ],
)
def test_overrides_that_do_not_fit(facts, message):
    router = make_router()
    with pytest.raises(InputError, match=message):
        router(tokens(), at(**facts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k=9: expected an integer, 1 <= top_k <= num_experts=8"),
        ({"top_k": 0}, "top_k=0"),
        ({"num_experts": 0, "top_k": 1}, "num_experts=0: expected an integer >= 1"),
        ({"model_dim": True}, "model_dim=True: expected an integer >= 1"),
        ({"gate_noise": -1.0}, "gate_noise=-1.0: expected a finite number >= 0"),
        ({"gate_noise": "1e-2"}, "gate_noise='1e-2'"),
        ({"gate_noise": float("inf")}, "gate_noise=inf"),
        ({"input_jitter": float("nan")}, "input_jitter=nan"),
        ({"gate_noise": 1.0, "learned_noise": True}, "gate_noise=1.0 and learned_noise=True: choose one"),
        ({"learned_noise": "yes"}, "learned_noise='yes': expected True or False"),
        ({"selection_bias": 1}, "selection_bias=1"),
        ({"batch_prioritized": "false"}, "batch_prioritized='false'"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_router(**options)


def test_options_of_a_config_reach_the_router_and_unknown_ones_are_refused():
    config = MoEConfig(
        model_dim=D,
        hidden_dim=4,
        num_experts=E,
        top_k=2,
        router={"name": "linear", "gate_noise": 0.5, "top_k": 3},
    )
    layer = config.build()
    assert (layer.router.gate_noise, layer.router.top_k) == (0.5, 3)
    assert config.router == {"name": "linear", "gate_noise": 0.5, "top_k": 3}
    for spec in ({"name": "linear", "gatenoise": 1.0}, {"name": "hash", "gatenoise": 1.0}):
        with pytest.raises(ConfigError, match="unknown option 'gatenoise'; did you mean 'gate_noise'"):
            MoEConfig(model_dim=D, hidden_dim=4, num_experts=E, router=spec).build()


def test_a_router_is_copied_with_its_noise():
    router, x = make_router(gate_noise=1.0), tokens()
    assert torch.equal(copy.deepcopy(router)(x, at(1)).logits_TE, router(x, at(1)).logits_TE)


def test_a_router_of_ones_own_needs_a_score_alone():
    class First(TokenChoiceRouter):
        def score(self, x_TD, context):
            return x_TD[:, : self.num_experts].float()

    layer = MoE(
        router=First(model_dim=D, num_experts=3), experts=MLPExperts(num_experts=3, model_dim=D, hidden_dim=4)
    )
    x = tokens()
    _, info = layer(x, return_info=True)
    assert torch.equal(info.routing.aux["ids_TK"][:, 0], x[:, :3].argmax(1))
