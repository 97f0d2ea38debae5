"""Unlike modules in one bank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexpert import ConfigError, MoE, RoutingContext
from flexpert.experts import ExpertBatch, ModuleExperts, StackedModules
from flexpert.routers import LinearRouter
from flexpert.testing import assert_close

D = 4


class Counted(nn.Module):
    """Doubles its rows and remembers how many there were."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, rows):
        self.calls.append(len(rows))
        return rows * 2


def make_bank():
    torch.manual_seed(0)
    return ModuleExperts(
        [
            nn.Linear(D, D),
            nn.Sequential(nn.Linear(D, 9), nn.ReLU(), nn.Linear(9, D, bias=False)),
            Counted(),
            nn.LayerNorm(D),
        ],
        model_dim=D,
    ).double()


@pytest.mark.parametrize("counts", [[3, 2, 1, 4], [0, 5, 0, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("spare", [0, 2])
def test_each_module_gets_its_rows(counts, spare):
    bank = make_bank()
    rows = torch.randn(sum(counts) + spare, D, dtype=torch.float64, requires_grad=True)
    y = bank(ExpertBatch(rows_ND=rows, counts_E=torch.tensor(counts), unit_N=None))
    parts = rows[: sum(counts)].split(counts)
    want = [module(part) for module, part in zip(bank.experts, parts, strict=True)]
    assert_close(y, torch.cat([*want, torch.zeros(spare, D, dtype=torch.float64)]))
    assert bank.experts[2].calls[:1] == ([counts[2]] if counts[2] else [0])  # [0]: the loop above alone


def test_a_module_without_rows_is_not_called():
    bank = make_bank()
    bank(ExpertBatch(rows_ND=torch.randn(2, D).double(), counts_E=torch.tensor([1, 1, 0, 0]), unit_N=None))
    assert bank.experts[2].calls == []


@pytest.mark.parametrize("kind", [ModuleExperts, StackedModules])
@pytest.mark.parametrize("counts", [[3, 0], [0, 0]])
def test_an_expert_without_rows_has_zero_gradients(kind, counts):
    bank = kind([nn.Linear(D, D), nn.Linear(D, D)], model_dim=D)
    batch = ExpertBatch(rows_ND=torch.randn(3, D), counts_E=torch.tensor(counts), unit_N=None)
    bank(batch).sum().backward()
    gradients = [p.grad for p in bank.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) == (2 if counts[0] else 0)
    with torch.no_grad():
        assert not bank(batch).requires_grad


def test_slots_of_other_banks_are_zero():
    bank, rows = make_bank(), torch.randn(6, D, dtype=torch.float64)
    slots = torch.tensor([-1, 2, 0])
    y = bank(ExpertBatch(rows_ND=rows, counts_E=torch.tensor([2, 3, 1]), unit_N=None, slot_E=slots))
    want = torch.cat([torch.zeros(2, D, dtype=torch.float64), rows[2:5] * 2, bank.experts[0](rows[5:])])
    assert_close(y, want)


def test_in_a_layer():
    torch.manual_seed(0)
    layer = MoE(router=LinearRouter(model_dim=D, num_experts=4, top_k=2), experts=make_bank()).double()
    x = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    y, info = layer(x, return_info=True)
    flat, want = x.view(-1, D), torch.zeros(15, D, dtype=torch.float64)
    scores = (flat @ layer.router.weight.T).softmax(-1)
    for t in range(15):
        for e in scores[t].topk(2).indices.tolist():
            want[t] = want[t] + scores[t, e] * layer.experts.experts[e](flat[t : t + 1])[0]
    assert_close(y.view(-1, D), want)
    leaves, grad = [x, layer.router.weight, *layer.experts.experts[1].parameters()], torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y.flatten(0, 1), leaves, grad.flatten(0, 1)),
        torch.autograd.grad(want, leaves, grad.flatten(0, 1)),
        strict=True,
    ):
        assert_close(a, b)
    assert info.stats.load_E.sum() == 30
    assert layer(x[:0]).shape == (0, 5, D)
    masked = layer(x, context=RoutingContext(mask=torch.zeros(3, 5, dtype=torch.bool)))
    assert masked.count_nonzero() == 0


def test_counts_of_parameters_and_operations():
    bank = make_bank()
    assert bank.params_of_experts() == [D * D + D, 9 * D + 9 + 9 * D, 0, 2 * D]
    assert bank.flops_of_experts() == [2 * D * D, 4 * 9 * D, 0, 0]
    layer = MoE(router=LinearRouter(model_dim=D, num_experts=4, top_k=2), experts=bank)
    assert layer.num_active_params() == 4 * D + (9 * D + 9 + 9 * D) + (D * D + D)
    assert layer.flops_per_token() == 2 * 4 * D + 4 * 9 * D + 2 * D * D


def test_no_experts():
    with pytest.raises(ConfigError, match="experts is empty: give at least one module"):
        ModuleExperts([], model_dim=D)
