"""Experts of each method against what the papers say of them."""

from __future__ import annotations

import pytest
import torch

from flexpert import ConfigError
from flexpert.convert import Clone, Granular, Importance, Slice
from flexpert.convert.dense import DenseMLP
from flexpert.convert.methods.importance import deal


def make(gated=True, hidden=24):
    generator = torch.Generator().manual_seed(0)
    shape = (2, hidden) if gated else (hidden,)
    return DenseMLP(
        w1=torch.randn(*shape, 5, generator=generator) * 0.3 + 0.1,
        b1=torch.randn(*shape, generator=generator),
        w2=torch.randn(5, hidden, generator=generator) * 2 - 1,
        b2=torch.randn(5, generator=generator),
        activation="silu",
    )


def parts(method, mlp, importance=None):
    return method.parts(mlp, torch.Generator().manual_seed(1), importance)


def equal_neurons(part, mlp):
    """Which hidden neurons of a part have the weights that the MLP has in that place."""
    same_w1 = (part.w1 == mlp.w1).all(-1)
    return (same_w1 if same_w1.dim() == 1 else same_w1.all(0)) & (part.w2 == mlp.w2).all(0)


def test_clones_are_copies():
    mlp = make()
    for expert in parts(Clone(num_experts=3), mlp).experts:
        assert all(torch.equal(t, mlp.tensors()[n]) for n, t in expert.tensors().items())


@pytest.mark.parametrize("gated", [False, True])
def test_drop_upcycling_redraws_its_share_of_neurons_by_their_statistics(gated):
    mlp = make(gated, hidden=2000)
    experts = parts(Clone(num_experts=2, redraw=0.5), mlp).experts
    kept = [equal_neurons(expert, mlp) for expert in experts]
    assert [int(k.sum()) for k in kept] == [1000, 1000]
    assert not torch.equal(kept[0], kept[1])  # each expert draws others
    for expert, keep in zip(experts, kept, strict=True):
        for name, axis in (("w1", -2), ("w2", 1)):
            new = expert.tensors()[name].index_select(axis, (~keep).nonzero().flatten())
            old = mlp.tensors()[name].index_select(axis, (~keep).nonzero().flatten())
            assert not (new == old).any()
            assert float(new.mean() - old.mean()) == pytest.approx(0, abs=0.05 * float(old.std()))
            assert float(new.std()) == pytest.approx(float(old.std()), rel=0.05)
        assert torch.equal(expert.b2, mlp.b2)


def test_gate_and_up_are_redrawn_by_their_own_statistics():
    mlp = make(hidden=2000)
    mlp.w1[0].mul_(10)
    expert = parts(Clone(num_experts=1, redraw=1.0), mlp).experts[0]
    for got, want in zip(expert.w1, mlp.w1, strict=True):
        assert float(got.std()) == pytest.approx(float(want.std()), rel=0.05)


def test_perturbation_is_relative_to_each_tensor():
    mlp = make(hidden=2000)
    for expert in parts(Clone(num_experts=2, perturb=0.1), mlp).experts:
        for name in ("w1", "w2", "b1"):
            noise = expert.tensors()[name] - mlp.tensors()[name]
            assert float(noise.std()) == pytest.approx(0.1 * float(mlp.tensors()[name].std()), rel=0.1)


@pytest.mark.parametrize("method", [Granular(copies=2, pieces_per_copy=4), Slice(num_experts=4)])
def test_slices_cover_every_neuron_once_and_the_bias_once(method):
    mlp = make()
    experts = parts(method, mlp).experts[:4]
    assert torch.equal(torch.cat([e.w1 for e in experts], dim=1), mlp.w1)
    assert torch.equal(torch.cat([e.w2 for e in experts], dim=1), mlp.w2)
    torch.testing.assert_close(sum(e.b2 for e in experts), mlp.b2)


def test_flops_of_the_active_experts():
    """Equal to the dense MLP's plus the router's for whole copies, K / E of it for slices."""
    mlp = make()
    for method, share in (
        (Clone(num_experts=4), 1.0),
        (Granular(copies=4, pieces_per_copy=3), 1.0),
        (Slice(num_experts=6, top_k=2), 1 / 3),
        (Importance(num_experts=6, num_shared=2, top_k=2), 0.5),
    ):
        config = method.layer(mlp)
        router = 2 * config.num_experts * config.model_dim
        assert config.flops_per_token() - router == pytest.approx(share * mlp.flops())


def test_the_most_active_neurons_are_shared_and_the_rest_dealt_alike():
    mlp = make(hidden=240)
    importance = torch.rand(240, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result = parts(Importance(num_experts=6, num_shared=2), mlp, importance)
    order = importance.argsort(descending=True)
    assert torch.equal(result.shared.w2, mlp.w2[:, order[:60]])
    assert torch.equal(result.shared.b2, mlp.b2)
    assert all(expert.b2.count_nonzero() == 0 for expert in result.experts)
    where = {tuple(column.tolist()): i for i, column in enumerate(mlp.w2.T)}
    mass = [float(importance[[where[tuple(c.tolist())] for c in e.w2.T]].sum()) for e in result.experts]
    assert max(mass) / min(mass) < 1.05
    contiguous = [float(importance[order[60 + 30 * i : 90 + 30 * i]].sum()) for i in range(6)]
    assert max(contiguous) / min(contiguous) > 2  # what dealing avoids


@pytest.mark.parametrize(("ratio", "width"), [(0.1, 36), (0.33, 27), (0.97, 1)])
def test_any_share_of_the_neurons_may_be_shared(ratio, width):
    mlp, method = make(hidden=240), Importance(num_experts=6, shared_ratio=ratio)
    shared = 240 - 6 * width
    config = method.layer(mlp)
    assert (config.hidden_dim, config.num_shared_experts, config.shared_hidden_dim) == (width, 1, shared)
    assert abs(shared / 240 - ratio) <= 6 / 240 / 2
    result = parts(method, mlp, torch.rand(240, dtype=torch.float64))
    assert result.shared.hidden_dim == shared
    assert [expert.hidden_dim for expert in result.experts] == [width] * 6
    neurons = torch.cat([part.w2 for part in (result.shared, *result.experts)], dim=1)
    assert torch.equal(neurons.sort(1).values, mlp.w2.sort(1).values)
    moe = config.build()
    assert moe.shared.expert.hidden_dim == shared
    assert config.num_params() == 6 * 5 + mlp.num_params() + 6 * 5  # the router, and a bias of each expert


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match="shared_ratio=0.999 .* each of 6 experts 0 neurons"):
        Importance(num_experts=6, shared_ratio=0.999).layer(make(hidden=240))
    with pytest.raises(ConfigError, match="shared_ratio=0.5, num_shared=2: expected a share between 0 and 1"):
        Importance(num_experts=6, shared_ratio=0.5, num_shared=2)
    with pytest.raises(ConfigError, match="shared_ratio=1.5, num_shared=1"):
        Importance(num_experts=6, shared_ratio=1.5)


def test_snake_order():
    hands = deal(torch.arange(9), 3)
    assert [hand.tolist() for hand in hands] == [[0, 5, 6], [1, 4, 7], [2, 3, 8]]
