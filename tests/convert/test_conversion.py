"""Converted models compute what the dense ones did, train on from there, and say what they are."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from flexpert import ConfigError, MoE, RoutingContext, routing_scope
from flexpert.convert import Clone, Granular, Importance, Slice, convert, find_mlps, load, save, to_dense
from flexpert.convert.conversion import build_layer, compare
from flexpert.experts import DropoutMLPExperts, SharedExpert

EXACT = {
    "clone top-2": Clone(num_experts=4, top_k=2),
    "clone top-1": Clone(num_experts=3),
    "clone zero": Clone(num_experts=3, top_k=2, router="zero"),
    "granular": Granular(copies=3, pieces_per_copy=4),
    "granular of one piece": Granular(copies=2, pieces_per_copy=1),
    "slice": Slice(num_experts=3),
    "importance": Importance(num_experts=5, num_shared=3),
    "importance by ratio": Importance(num_experts=5, shared_ratio=0.4),
}


def difference(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
def test_exact_start(case, method):
    want = case.outputs(case.model)
    state = torch.get_rng_state()
    report = convert(case.model, case.glob, method, calibration=[case.batch])
    assert torch.equal(state, torch.get_rng_state())
    assert report.exact
    assert difference(case.outputs(case.model), want) < 1e-5
    assert max(layer.difference for layer in report.layers.values()) < 1e-5


@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
def test_exact_start_in_bf16_up_to_its_rounding(case, method):
    case.model.bfloat16()
    want = case.outputs(case.model)
    calibration = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in case.batch.items()}]
    report = convert(case.model, case.glob, method, calibration=calibration)
    # one unit in the last place of the largest value is 2^-7 at most; blocks add theirs up
    assert max(layer.difference for layer in report.layers.values()) <= 2**-6
    assert difference(case.outputs(case.model), want) < 0.04
    assert {p.dtype for p in case.model.parameters()} == {torch.bfloat16}


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
def test_training_begins_at_the_dense_loss_and_goes_on(make_case, method):
    case = make_case("llama")
    ids, dense = case.batch["input_ids"], copy.deepcopy(case.model).train()
    start = loss_of(dense, ids).item()
    model = case.model.train()
    convert(model, case.glob, method, calibration=[case.batch])
    assert all(module.training for module in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        with routing_scope(model) as scope:
            loss = loss_of(model, ids)
            (loss + 0.01 * scope.losses["balance"].mean()).backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(start, rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("method", "by_task"),
    [
        (Clone(num_experts=3), True),
        (Slice(num_experts=4, top_k=2), True),
        (Importance(num_experts=5, num_shared=3, top_k=2), True),
        (Granular(copies=3, pieces_per_copy=4), True),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_task_teaches_the_router(make_case, method, by_task):
    case = make_case("llama")
    convert(case.model, case.glob, method, calibration=[case.batch])
    loss_of(case.model.train(), case.batch["input_ids"]).backward()
    assert case.model.model.layers[0].mlp.router.weight.grad.abs().max() > 1e-8


def test_granular_rows_are_tied_at_first_and_part_in_training(make_case):
    case = make_case("llama")
    convert(case.model, "*.0.mlp", Granular(copies=3, pieces_per_copy=4))
    layer = case.model.model.layers[0].mlp
    rows = layer.router.weight.detach().view(3, 4, -1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    x = torch.randn(300, 16)
    chosen = layer(x, return_info=True)[1].routing.aux["ids_TK"] // 4
    assert (chosen == chosen[:, :1]).all()
    assert chosen.unique().numel() == 3
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    target = torch.randn(300, 16)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    chosen = layer(x, return_info=True)[1].routing.aux["ids_TK"] // 4
    assert (chosen != chosen[:, :1]).any()  # tokens with pieces of several copies


def test_only_what_is_named_is_converted(make_case):
    case = make_case("llama")
    convert(case.model, "*.1.mlp", Clone(num_experts=2))
    kinds = [type(layer.mlp).__name__ for layer in case.model.model.layers]
    assert kinds == ["LlamaMLP", "MoE"]
    convert(case.model, "*.0.mlp", Slice(num_experts=2))  # another method for another layer
    assert set(case.model.config.flexpert["layers"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    with pytest.raises(ConfigError, match="matches no MLP of a known layout, only model.layers.0.mlp"):
        convert(case.model, case.glob, Clone(num_experts=2))


def test_generation_with_a_cache(make_case):
    case = make_case("llama")
    options = {"input_ids": case.batch["input_ids"], "max_new_tokens": 8, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(options["input_ids"])}
    want = case.model.generate(**options)
    convert(case.model, case.glob, Granular(copies=3, pieces_per_copy=4))
    assert torch.equal(case.model.generate(**options), want)


def test_frozen_mlps_become_experts_that_learn(make_case):
    case = make_case("llama")
    case.model.requires_grad_(False)
    convert(case.model, case.glob, Clone(num_experts=2))
    learning = {name.split(".")[3] for name, p in case.model.named_parameters() if p.requires_grad}
    assert learning == {"mlp"}


def test_dropout_of_the_output_stays(make_case):
    case = make_case("gpt2")
    convert(case.model, case.glob, Clone(num_experts=2))
    kinds = [type(part) for part in case.model.transformer.h[0].mlp]
    assert kinds == [MoE, nn.Dropout]


class T5Part(nn.Module):
    """The MLPs of a T5, where a dropout lies between the matrices."""

    def __init__(self, gated):
        super().__init__()
        config = transformers.T5Config(
            d_model=6, d_ff=24, dropout_rate=0.4, feed_forward_proj="gated-gelu" if gated else "relu"
        )
        self.mlp = (T5DenseGatedActDense if gated else T5DenseActDense)(config)
        for parameter in self.mlp.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        return self.mlp(x)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("method", "share"),
    [
        (Clone(num_experts=3), 1.0),
        (Clone(num_experts=2, top_k=2, router="zero"), 0.5),  # two masks of equal weight
        (Granular(copies=2, pieces_per_copy=4), 1.0),
        (Slice(num_experts=3), 1.0),
        (Importance(num_experts=4, shared_ratio=0.5), 1.0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_dropout_of_the_hidden_layer_goes_into_the_experts(method, share, gated):
    """In evaluation nothing is dropped; in training mean and variance are those of the dense MLP."""
    torch.manual_seed(0)
    model, x = T5Part(gated).eval(), torch.randn(1, 6)
    dense = copy.deepcopy(model)
    ((_, mlp),) = find_mlps(model).values()
    assert mlp.dropout == pytest.approx(0.4)
    assert convert(model, "mlp", method, calibration=[x]).exact
    want = dense(x)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    seen = []
    dense.mlp.wo.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense(x)
    variance = share * (dense.mlp.wo.weight * seen[0]).square().sum(1) * 0.4 / 0.6
    with torch.no_grad():
        y = model.train()(x.expand(20_000, 6))
    assert ((y.mean(0) - want[0]).abs() < 5 * (variance / len(y)).sqrt()).all()
    torch.testing.assert_close(y.var(0), variance, rtol=0.08, atol=0)
    assert to_dense(model).exact
    assert isinstance(model.mlp, SharedExpert)
    assert model.mlp.dropout == pytest.approx(0.4)
    torch.testing.assert_close(model.eval()(x), want, rtol=1e-4, atol=1e-4)


def test_a_model_with_such_dropout_comes_back_from_disk(tmp_path):
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 40, (2, 5))
    want = model(input_ids=ids, labels=ids).logits
    report = convert(model, "*.DenseReluDense", Clone(num_experts=2))
    assert list(report.layers) == [f"{part}.block.0.layer.{i}.DenseReluDense" for part, i in PARTS]
    torch.testing.assert_close(model(input_ids=ids, labels=ids).logits, want)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert [m.dropout for m in again.modules() if isinstance(m, DropoutMLPExperts)] == [0.1, 0.1]
    assert torch.equal(again(input_ids=ids, labels=ids).logits, model(input_ids=ids, labels=ids).logits)


PARTS = (("encoder", 1), ("decoder", 2))


def test_seed_decides_and_the_name_too(make_case):
    rows = []
    for seed in (0, 0, 1):
        model = make_case("llama").model
        convert(model, "*.mlp", Clone(num_experts=2), seed=seed)
        rows.append([layer.mlp.router.weight.detach() for layer in model.model.layers])
    assert torch.equal(rows[0][0], rows[1][0])
    assert not torch.equal(rows[0][0], rows[2][0])
    assert not torch.equal(rows[0][0], rows[0][1])
    assert float(torch.stack(rows[0]).std()) == pytest.approx(0.02, rel=0.5)


def test_settings_reach_the_layer(make_case):
    case = make_case("llama")
    settings = {
        "capacity_factor": 0.5,
        "losses": ["balance", "z"],
        "router": {"selection_bias": True, "gate_noise": 1.0},
    }
    report = convert(case.model, case.glob, Clone(num_experts=2), settings=settings)
    layer = case.model.model.layers[0].mlp
    assert layer.router.selection_bias.dtype is torch.float32
    assert layer.router.weight_rule.straight_through
    assert set(layer.losses) == {"balance", "z"}
    assert report.why_not_exact == "capacity_factor=0.5 may drop tokens"


def test_another_router(make_case):
    case = make_case("llama")
    want = case.outputs(case.model)
    convert(case.model, case.glob, Clone(num_experts=3, top_k=2), settings={"router": {"name": "cosine"}})
    assert case.model.model.layers[0].mlp.router.log_scale.dim() == 0
    assert difference(case.outputs(case.model), want) < 1e-5


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            Slice(num_experts=5),
            {},
            "layers.0.mlp: num_experts=5 does not divide the MLP's hidden_dim=24; it divides",
        ),
        (Granular(copies=2, pieces_per_copy=7), {}, "pieces_per_copy=7 does not divide .* 6, 8"),
        (
            Importance(num_experts=4),
            {"calibration": []},
            r"num_experts \+ num_shared=5 does not divide the MLP's hidden_dim=24",
        ),
        (Importance(num_experts=5), {}, "give calibration=, a few batches of data"),
        (Importance(num_experts=5), {"calibration": []}, "calibration has no batch"),
        (
            Clone(num_experts=2),
            {"settings": {"top_k": 2}},
            "settings: unknown option 'top_k'; valid: batch_pri",
        ),
        (Clone(num_experts=2), {"settings": {"losses": ["z2"]}}, "layers.0.mlp: unknown loss 'z2'"),
        (Clone(num_experts=2), {"settings": {"router": {"nois": 1}}}, "unknown option 'nois'"),
        (
            Granular(copies=2, pieces_per_copy=2),
            {"settings": {"router": {"name": "hash"}}},
            "method 'granular' sets the rows of the router, and .* has none; use a linear or cosine router",
        ),
    ],
)
def test_errors_come_before_any_change(make_case, method, options, message):
    case = make_case("llama")
    kinds = [type(module) for module in case.model.modules()]
    with pytest.raises(ConfigError, match=message):
        convert(case.model, case.glob, method, **options)
    assert [type(module) for module in case.model.modules()] == kinds
    assert not hasattr(case.model.config, "flexpert")


def test_a_wrong_conversion_is_refused(make_case, monkeypatch):
    case = make_case("llama")
    monkeypatch.setattr(Slice, "parts", lambda self, mlp, *_: Clone(num_experts=2).parts(mlp, *_))
    monkeypatch.setattr(Slice, "layer", lambda self, mlp: Clone(num_experts=2, top_k=2).layer(mlp))
    convert(case.model, "*.0.mlp", Slice(num_experts=2))  # clones, which are right
    monkeypatch.setattr(Slice, "rows", lambda self, e, d, g: torch.full((e, d), float("nan")))
    with pytest.raises(
        ConfigError, match="model.layers.1.mlp: the converted layer is off by nan; please report"
    ):
        convert(case.model, "*.1.mlp", Slice(num_experts=2))


def test_build_layer_and_compare():
    config = Clone(num_experts=2).layer(mlp := _mlp())
    layer = build_layer(
        config, {"experts.w1": mlp.w1.repeat(2, 1, 1), "experts.w2": mlp.w2.repeat(2, 1, 1)}, 3
    )
    assert compare(mlp, layer) < 1e-6
    with torch.no_grad():
        layer.experts.w2.mul_(1.5)
    assert compare(mlp, layer) == pytest.approx(0.5, rel=1e-5)
    assert layer.training
    context = RoutingContext(mask=torch.tensor([True, False]))
    assert layer(torch.randn(2, 4), context=context)[1].count_nonzero() == 0


def _mlp():
    from flexpert.convert.dense import DenseMLP

    torch.manual_seed(0)
    return DenseMLP(w1=torch.randn(6, 4), b1=None, w2=torch.randn(4, 6), b2=None, activation="relu")
