"""The router z-loss."""

from __future__ import annotations

import math

import pytest
import torch

from flexpert import InputError, MoE, MoEConfig, Routing, RoutingContext
from flexpert.losses import z_loss
from flexpert.testing import assert_close


def routing_of(logits_TE):
    counts = torch.zeros(logits_TE.shape[1], dtype=torch.int64)
    rows = torch.zeros(0)
    return Routing(
        unit_N=rows.long(), weight_N=rows, counts_E=counts, num_units=len(logits_TE), logits_TE=logits_TE
    )


def test_zero_logits():
    assert float(z_loss(routing_of(torch.zeros(5, 8)), RoutingContext())) == pytest.approx(math.log(8) ** 2)


@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient(masked):
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    mask = torch.arange(9) % 3 != 1 if masked else None
    value = z_loss(routing_of(z), RoutingContext(mask=mask))
    rows = [row.exp().sum().log() ** 2 for t, row in enumerate(z) if mask is None or mask[t]]
    want = sum(rows) / len(rows)
    assert_close(value, want)
    (grad,) = torch.autograd.grad(value, z, retain_graph=True)
    assert_close(grad, torch.autograd.grad(want, z)[0])


def test_large_logits_do_not_overflow():
    value = z_loss(routing_of(torch.tensor([[1000.0, 0.0]])), RoutingContext())
    assert value == 1000.0**2


def test_no_tokens():
    layer = MoE(MoEConfig(model_dim=4, hidden_dim=4, num_experts=3, losses=["z"]))
    for x, mask in ((torch.zeros(0, 4), None), (torch.randn(3, 4), torch.zeros(3, dtype=torch.bool))):
        value = layer(x, context=RoutingContext(mask=mask), return_info=True)[1].losses["z"]
        assert value == 0
        value.backward()
    assert layer.router.weight.grad.count_nonzero() == 0


def test_experts_ruled_out_have_no_part():
    torch.manual_seed(0)
    layer = MoE(MoEConfig(model_dim=4, hidden_dim=4, num_experts=3, losses=["z"])).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    allowed = torch.tensor([[True, False, True]] * 6)
    allowed[2] = False  # no expert at all: nothing to keep small
    _, info = layer(x, context=RoutingContext(expert_mask=allowed), return_info=True)
    logits = x @ layer.router.weight.T
    rows = [logits[t, [0, 2]].exp().sum().log() ** 2 for t in range(6) if t != 2]
    assert_close(info.losses["z"], sum(rows) / 6)
    info.losses["z"].backward()
    assert layer.router.weight.grad.isfinite().all()


def test_needs_logits():
    soft = MoE(MoEConfig(model_dim=4, hidden_dim=4, num_experts=3, router="soft", losses=["z"]))
    with pytest.raises(InputError, match="loss 'z' needs logits, which this router does not give; remove it"):
        soft(torch.randn(5, 4), return_info=True)
