"""The balance loss against its definition, its extremes and its scopes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert import ConfigError, DenseRouting, InputError, MoE, MoEConfig, Routing, RoutingContext
from flexpert.losses import balance, balance_first_choice
from flexpert.testing import assert_close

D = 5


def routing_of(ids, probs):
    """A routing of given choices; ids has E for none."""
    ids_TK, probs_TE = torch.as_tensor(ids), torch.as_tensor(probs, dtype=torch.float64)
    counts = torch.bincount(ids_TK.flatten(), minlength=probs_TE.shape[1] + 1)[:-1]
    rows = torch.zeros(int(counts.sum()))
    return Routing(
        unit_N=rows.long(),
        weight_N=rows,
        counts_E=counts,
        num_units=len(ids_TK),
        probs_TE=probs_TE,
        aux={"ids_TK": ids_TK},
    )


def naive(ids_TK, probs_TE, mask, first_only=False):
    """E * sum_e share of the choices * mean of the normalised scores, over real tokens."""
    num_experts = probs_TE.shape[1]
    counts, total, tokens = [0] * num_experts, probs_TE.new_zeros(num_experts), 0
    for t, ids in enumerate(ids_TK.tolist()):
        if mask is None or mask[t]:
            tokens += 1
            total = total + probs_TE[t] / probs_TE[t].sum()
            for e in ids[:1] if first_only else ids:
                if e < num_experts:
                    counts[e] += 1
    if not sum(counts):
        return probs_TE.new_zeros(())
    return sum(num_experts * n / sum(counts) * total[e] / tokens for e, n in enumerate(counts))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_one_at_perfect_balance(top_k):
    ids = [[(t + k) % 4 for k in range(top_k)] for t in range(8)]
    for term in (balance, balance_first_choice):
        value = term(routing_of(ids, torch.full((8, 4), 0.25)), RoutingContext())
        assert float(value) == pytest.approx(1.0, abs=1e-12)


def test_num_experts_at_collapse():
    probs = torch.eye(4)[[2] * 8]
    assert balance(routing_of([[2]] * 8, probs), RoutingContext()) == 4.0
    # With two choices at most half of the load is on the expert that has all of the probability.
    assert balance(routing_of([[2, 1]] * 8, probs), RoutingContext()) == 2.0
    assert balance_first_choice(routing_of([[2, 1]] * 8, probs), RoutingContext()) == 4.0


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 12),
    num_experts=st.integers(1, 7),
    router=st.sampled_from(["softmax", "sigmoid"]),
    masked=st.booleans(),
    first_only=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_value_and_gradient(tokens, num_experts, router, masked, first_only, seed, data):
    torch.manual_seed(seed)
    top_k = data.draw(st.integers(1, num_experts))
    z = torch.randn(tokens, num_experts, dtype=torch.float64, requires_grad=True)
    probs = z.softmax(-1) if router == "softmax" else z.sigmoid()
    ids = z.detach().topk(top_k).indices
    mask = torch.rand(tokens) > 0.4 if masked else None
    if masked:
        ids = ids.masked_fill(~mask[:, None], num_experts)
    term = balance_first_choice if first_only else balance
    value = term(routing_of(ids, probs), RoutingContext(mask=mask))
    want = naive(ids, probs, mask, first_only)
    assert_close(value, want)
    (grad,) = torch.autograd.grad(value, z, retain_graph=True)
    if want.requires_grad:
        assert_close(grad, torch.autograd.grad(want, z)[0], scale=1e-3)
    else:
        assert grad.count_nonzero() == 0


def test_drops_do_not_count():
    torch.manual_seed(0)
    layer, x = MoE(MoEConfig(model_dim=D, hidden_dim=4, num_experts=4, top_k=2)), torch.randn(20, D)
    _, free = layer(x, return_info=True)
    _, tight = layer(x, capacity_factor=0.2, return_info=True)
    assert tight.stats.dropped > 0
    assert torch.equal(free.losses["balance"], tight.losses["balance"])


@pytest.mark.parametrize("masked", [False, True])
def test_sequence_scope_is_the_mean_over_separate_sequences(masked):
    torch.manual_seed(0)
    spec = {"name": "balance", "scope": "sequence"}
    layer = MoE(MoEConfig(model_dim=D, hidden_dim=4, num_experts=4, top_k=2, losses=[spec])).double()
    x = torch.randn(3, 6, D, dtype=torch.float64)
    mask = torch.rand(3, 6) > 0.3
    mask[1] = False  # a sequence without tokens has no part in the mean
    contexts = [RoutingContext(mask=m if masked else None) for m in (mask, *mask.split(1))]
    _, info = layer(x, context=contexts[0], return_info=True)
    parts = [
        layer(x[i : i + 1], context=contexts[1 + i], return_info=True)[1].losses["balance"] for i in range(3)
    ]
    if masked:
        del parts[1]
    want = torch.stack(parts).mean()
    assert_close(info.losses["balance"], want)
    weight = layer.router.weight
    assert_close(
        torch.autograd.grad(info.losses["balance"], weight)[0],
        torch.autograd.grad(want, weight)[0],
        scale=1e-3,
    )
    flat = RoutingContext(mask=mask.flatten() if masked else None, sequence_length=6)
    _, again = layer(x.flatten(0, 1), context=flat, return_info=True)
    assert_close(again.losses["balance"], want)


def test_sequence_scope_needs_sequences():
    spec = {"name": "balance", "scope": "sequence"}
    layer = MoE(MoEConfig(model_dim=D, hidden_dim=4, num_experts=4, losses=[spec]))
    with pytest.raises(
        InputError, match=r"scope='sequence' needs an input of shape.*got sequence_length=None"
    ):
        layer(torch.randn(6, D), return_info=True)
    with pytest.raises(InputError, match="sequence_length that divides the 6 tokens; got sequence_length=4"):
        layer(torch.randn(6, D), context=RoutingContext(sequence_length=4), return_info=True)
    assert layer(torch.randn(6, D)).shape == (6, D)  # nothing is computed that is not asked for


@pytest.mark.parametrize(
    "router", ["linear", "expert_choice", "soft", {"name": "linear", "selection": "top_p"}]
)
@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_no_tokens(router, scope):
    spec = {"name": "balance", "scope": scope}
    layer = MoE(MoEConfig(model_dim=D, hidden_dim=4, num_experts=4, router=router, losses=[spec]))
    empty = layer(torch.zeros(0, 3, D), return_info=True)[1].losses["balance"]
    hidden = RoutingContext(mask=torch.zeros(2, 3, dtype=torch.bool))
    masked = layer(torch.randn(2, 3, D), context=hidden, return_info=True)[1].losses["balance"]
    for value in (empty, masked):
        # Soft slots exist without tokens: their rows are counted, but weigh nothing.
        assert value == 0
        value.backward()
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in layer.parameters())


def test_routers_without_scores():
    bare = Routing(
        unit_N=torch.zeros(2).long(), weight_N=torch.ones(2), counts_E=torch.tensor([1, 1]), num_units=2
    )
    with pytest.raises(InputError, match="loss 'balance' needs gate scores, which this router does not give"):
        balance(bare, RoutingContext())
    dense = DenseRouting(
        dispatch_BSP=torch.ones(1, 2, 2),
        combine_BSP=torch.ones(1, 2, 2),
        counts_E=torch.tensor([1, 1]),
        num_units=2,
        probs_TE=torch.full((2, 2), 0.5),
    )
    assert balance(dense, RoutingContext()) == 1
    with pytest.raises(InputError, match="loss 'balance_first_choice' needs a router in which tokens choose"):
        balance_first_choice(dense, RoutingContext())


def test_routings_without_ids_are_counted_by_their_rows():
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
    counts = torch.tensor([2, 1])
    ragged = Routing(
        unit_N=torch.tensor([0, 2, 1, 0]),
        weight_N=torch.ones(4),
        counts_E=counts,
        num_units=3,
        probs_TE=probs,
    )
    want = naive(torch.tensor([[0], [1], [0]]), probs, None)
    assert_close(balance(ragged, RoutingContext()), want)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (["balanc"], "unknown loss 'balanc': did you mean 'balance'"),
        (
            [{"name": "balance", "scop": "sequence"}],
            "loss 'balance': unknown option 'scop'; did you mean 'scope'",
        ),
        (
            [{"name": "balance", "scope": "batch"}],
            "scope='batch': expected one of micro_batch, sequence, global",
        ),
        (["balance", "balance"], "loss 'balance' is named twice; give each a 'label'"),
    ],
)
def test_bad_configs(losses, message):
    config = MoEConfig(model_dim=D, hidden_dim=4, num_experts=4, losses=losses)
    with pytest.raises(ConfigError, match=message):
        config.build()


def test_labels():
    losses = ["balance", {"name": "balance", "scope": "sequence", "label": "per_sequence"}, "z"]
    layer = MoE(MoEConfig(model_dim=D, hidden_dim=4, num_experts=4, losses=losses))
    assert list(layer(torch.randn(2, 3, D), return_info=True)[1].losses) == ["balance", "per_sequence", "z"]
