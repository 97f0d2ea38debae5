"""Score functions: the formulas, their precision and their parameters."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from flexpert import ConfigError, InputError, MoE, MoEConfig, RoutingContext, ops
from flexpert.routers import CosineRouter, HashRouter, LinearRouter
from flexpert.routers.scores import scoring
from flexpert.testing import assert_close

NOTHING = RoutingContext()
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tokens(count=20, dim=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype):
    router = LinearRouter(model_dim=6, num_experts=5).to(dtype)
    assert router.weight.shape == (5, 6)
    x = tokens(dtype=dtype)
    logits = router.score(x, NOTHING)
    assert logits.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    # Half-precision weights and tokens are exact in fp32: only fp32 rounding remains.
    assert_close(logits, x.double() @ router.weight.double().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_in_the_dtype_of_its_tokens(dtype):
    router = LinearRouter(model_dim=6, num_experts=5, fp32=False).to(dtype)
    logits = router.score(tokens(dtype=dtype), NOTHING)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.to(dtype).float())
    assert_close(logits, tokens(dtype=dtype).double() @ router.weight.double().T, 2e-2)


def test_routing_is_fp32_under_autocast():
    router, x = LinearRouter(model_dim=6, num_experts=5), tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x, NOTHING)
    outside = router(x, NOTHING)
    assert inside.weight_N.dtype == torch.float32
    assert torch.equal(inside.weight_N, outside.weight_N)
    assert torch.equal(inside.unit_N, outside.unit_N)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_leaves_parameters_as_they_are(dtype):
    for kind in (LinearRouter, CosineRouter):
        router = kind(model_dim=6, num_experts=5).to(dtype)
        before = {name: p.clone() for name, p in router.named_parameters()}
        router(tokens(dtype=dtype), NOTHING)
        for name, parameter in router.named_parameters():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, before[name])


def test_cosine():
    torch.manual_seed(0)
    router = CosineRouter(model_dim=6, num_experts=5, proj_dim=4, temperature=0.5).double()
    x = tokens()
    h = x @ router.projector.weight.T + router.projector.bias
    want = torch.stack([F.cosine_similarity(h, m[None]) for m in router.weight], 1) / 0.5
    assert_close(router.score(x, NOTHING), want, 1e-7)  # the temperature starts in fp32
    assert router.projector.weight.shape == (4, 6)
    assert router.weight.shape == (5, 4)
    assert CosineRouter(model_dim=6, num_experts=5).weight.shape == (5, 256)


def test_cosine_temperature_is_learned_down_to_its_floor():
    router = CosineRouter(
        model_dim=6, num_experts=5, proj_dim=4, temperature=0.5, min_temperature=0.1
    ).double()
    x = tokens()
    cosine = router.score(x, NOTHING) * 0.5
    router.score(x, NOTHING).square().sum().backward()
    assert router.log_scale.grad.abs() > 0
    with torch.no_grad():
        router.log_scale.fill_(math.log(1 / 0.2))
        assert_close(router.score(x, NOTHING), cosine / 0.2, 1e-6)
        router.log_scale.fill_(math.log(1 / 0.01))
        assert_close(router.score(x, NOTHING), cosine / 0.1, 1e-6)


def test_cosine_of_zero_is_finite():
    router = CosineRouter(model_dim=6, num_experts=5, proj_dim=4)
    torch.nn.init.zeros_(router.projector.bias)
    x = torch.zeros(3, 6, requires_grad=True)
    logits = router.score(x, NOTHING)
    assert logits.count_nonzero() == 0
    logits.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0, min_temperature=0.01"),
        ({"temperature": 0.005}, "0 < min_temperature <= temperature"),
        ({"min_temperature": 0.0}, "min_temperature=0.0"),
        ({"temperature": "0.5"}, "temperature='0.5': expected a finite number"),
        ({"proj_dim": 0}, "proj_dim=0: expected an integer >= 1"),
    ],
)
def test_bad_cosine(options, message):
    with pytest.raises(ConfigError, match=message):
        CosineRouter(model_dim=4, num_experts=2, **options)


# Hash ------------------------------------------------------------------------------------------------


def hash_layer(top_k=2, **options):
    router = {"name": "hash", **options}
    return MoE(MoEConfig(model_dim=6, hidden_dim=4, num_experts=7, top_k=top_k, router=router))


def choices(layer, ids, x=None):
    x = tokens(len(ids), dtype=torch.float32) if x is None else x
    _, info = layer(x, context=RoutingContext(token_ids=ids), return_info=True)
    return info.routing.aux["ids_TK"]


def test_hash_sends_equal_ids_to_equal_experts_whatever_the_tokens():
    layer, ids = hash_layer(), torch.tensor([5, 9, 5, 5, 9, 0, 150_000, 0])
    first = choices(layer, ids)
    assert torch.equal(first, choices(layer, ids, x=torch.randn(8, 6)))
    for token in ids.unique():
        assert len(first[ids == token].unique(dim=0)) == 1
    assert torch.equal(choices(layer, ids.int()), first)


@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_hash_gives_different_experts_of_equal_weight(top_k):
    layer, ids = hash_layer(top_k), torch.arange(300)
    chosen = choices(layer, ids)
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    _, info = layer(tokens(300, dtype=torch.float32), context=RoutingContext(token_ids=ids), return_info=True)
    assert_close(info.routing.weight_N, torch.full((300 * top_k,), 1 / top_k))


def test_hash_spreads_ids_evenly():
    counts = torch.bincount(choices(hash_layer(1), torch.arange(7000)).flatten(), minlength=7)
    chi_square = ((counts - 1000.0).square() / 1000).sum()
    assert chi_square < 6 + 5 * math.sqrt(12)


def test_hash_depends_on_its_seed_alone():
    ids = torch.arange(100)
    torch.manual_seed(1)
    one = choices(hash_layer(), ids)
    torch.manual_seed(2)
    assert torch.equal(choices(hash_layer(), ids), one)
    assert not torch.equal(choices(hash_layer(seed=1), ids), one)


def test_hash_needs_token_ids():
    layer = hash_layer()
    with pytest.raises(InputError, match=r"token_ids is missing.*RoutingContext\(token_ids=\.\.\.\)"):
        layer(torch.randn(3, 6))
    with pytest.raises(InputError, match=r"token_ids has dtype torch.float32; expected torch.int64"):
        layer(torch.randn(3, 6), context=RoutingContext(token_ids=torch.ones(3)))
    assert sum(p.numel() for p in HashRouter(model_dim=6, num_experts=7).parameters()) == 0


# Scorings --------------------------------------------------------------------------------------------


def test_scorings():
    z = torch.linspace(-5, 5, 12, dtype=torch.float64).view(3, 4)
    assert_close(scoring("softmax", z), z.exp() / z.exp().sum(1, keepdim=True))
    assert_close(scoring("sigmoid", z), 1 / (1 + (-z).exp()))
    assert_close(scoring("sqrt_softplus", z), (1 + z.exp()).log().sqrt())
    assert torch.equal(scoring("uniform", z), torch.ones_like(z))


@pytest.mark.parametrize("name", ops.SCORINGS)
def test_scorings_of_extreme_logits_have_finite_gradients(name):
    limit = torch.finfo(torch.float32).min
    z = torch.tensor([[-200.0, 0.0, 90.0], [limit, 1.0, limit]], requires_grad=True)
    score = scoring(name, z)
    assert score.isfinite().all()
    if score.requires_grad:
        score.sum().backward()
        assert z.grad.isfinite().all()


def test_unknown_scoring():
    with pytest.raises(ConfigError, match="unknown scoring 'softmx': did you mean 'softmax'"):
        LinearRouter(model_dim=4, num_experts=2, scoring="softmx")
