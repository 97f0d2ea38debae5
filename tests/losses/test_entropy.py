"""The entropy of the gate."""

from __future__ import annotations

import math

import pytest
import torch

from flexpert import InputError, MoE, MoEConfig, Routing, RoutingContext
from flexpert.losses import entropy
from flexpert.testing import assert_close


def routing_of(probs_TE):
    rows = torch.zeros(0)
    counts = torch.zeros(probs_TE.shape[1], dtype=torch.int64)
    return Routing(
        unit_N=rows.long(), weight_N=rows, counts_E=counts, num_units=len(probs_TE), probs_TE=probs_TE
    )


def test_extremes():
    assert float(entropy(routing_of(torch.full((3, 8), 0.125)), RoutingContext())) == pytest.approx(
        math.log(8)
    )
    assert float(entropy(routing_of(torch.eye(4)), RoutingContext())) == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_value_and_gradient(normalised, masked):
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    probs = z.softmax(-1) if normalised else z.sigmoid()
    mask = torch.arange(9) % 3 != 1 if masked else None
    value = entropy(routing_of(probs), RoutingContext(mask=mask))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for t in range(9):
        if mask is None or mask[t]:
            count += 1
            for p in probs[t] / probs[t].sum():
                total = total - p * p.log()
    want = total / count
    assert_close(value, want)
    (grad,) = torch.autograd.grad(value, z, retain_graph=True)
    assert_close(grad, torch.autograd.grad(want, z)[0])


def test_certain_gates_have_finite_gradients():
    z = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    entropy(routing_of(z.softmax(-1)), RoutingContext()).backward()
    assert z.grad.isfinite().all()


def test_no_tokens():
    layer = MoE(MoEConfig(model_dim=4, hidden_dim=4, num_experts=3, losses=["entropy"]))
    for x, mask in ((torch.zeros(0, 4), None), (torch.randn(3, 4), torch.zeros(3, dtype=torch.bool))):
        value = layer(x, context=RoutingContext(mask=mask), return_info=True)[1].losses["entropy"]
        assert value == 0
        value.backward()
    assert layer.router.weight.grad.count_nonzero() == 0


def test_minimised_it_makes_top_p_use_fewer_experts():
    torch.manual_seed(0)
    config = MoEConfig(
        model_dim=8,
        hidden_dim=4,
        num_experts=8,
        router={"name": "linear", "selection": {"name": "top_p", "p": 0.4}},
        losses=["entropy"],
    )
    layer, x = MoE(config), torch.randn(200, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    loads = []
    for _ in range(40):
        _, info = layer(x, return_info=True)
        loads.append(float(info.stats.load_E.sum()) / 200)
        optimizer.zero_grad()
        info.losses["entropy"].backward()
        optimizer.step()
    assert loads[0] > 1.4
    assert loads[-1] < 1.05


def test_needs_scores():
    bare = Routing(
        unit_N=torch.zeros(0).long(), weight_N=torch.ones(0), counts_E=torch.tensor([0]), num_units=0
    )
    with pytest.raises(InputError, match="loss 'entropy' needs gate scores"):
        entropy(bare, RoutingContext())
