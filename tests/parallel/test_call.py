"""What one call works out on its rank: counts by rank, a bank with other parameters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flexpert import InputError, MoE, MoEConfig, ops
from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize
from flexpert.parallel.bound import rows_with
from flexpert.parallel.meeting import by_rank
from flexpert.testing import run_ranks


def test_counts_by_rank_go_to_one_of_each_block():
    mesh = SimpleNamespace(expert_ranks=2, slices=2, whole=SimpleNamespace(rank=1, size=4))
    assert by_rank([1, 2, 3, 4], mesh, r=1) == [[0, 0], [1, 2], [0, 0], [3, 4]]
    assert by_rank([1, 2, 3, 4], mesh, r=2) == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_a_bank_computes_with_other_parameters_and_keeps_its_own():
    bank = MoE(MoEConfig(model_dim=4, hidden_dim=6, num_experts=2, expert_bias="b1")).experts
    own = dict(bank.named_parameters())
    other = {name: torch.randn_like(p) for name, p in own.items()}
    args = torch.randn(5, 4), torch.arange(5), torch.tensor([2, 3])
    with torch.no_grad():
        want = torch.func.functional_call(SimpleRows(bank), {f"bank.{n}": t for n, t in other.items()}, args)
        assert torch.equal(rows_with(bank, other, *args, None), want)
    with pytest.raises((InputError, RuntimeError)):
        rows_with(bank, {**other, "w1": torch.randn(2, 6, 3)}, *args, None)
    assert all(a is b for a, b in zip(own.values(), bank.parameters(), strict=True))


class SimpleRows(torch.nn.Module):
    def __init__(self, bank):
        super().__init__()
        self.bank = bank

    def forward(self, *args):
        return self.bank.rows(*args)


def kernels_of_plans():
    layer = parallelize(MoE(MoEConfig(model_dim=4, hidden_dim=6, num_experts=4, top_k=2)), expert_mesh(4))
    seen, rows = [], layer.experts.rows

    def watched(*args):
        seen.append(ops.wanted_kernel())
        return rows(*args)

    layer.experts.rows = watched
    for plan in (ExecutionPlan(r=0), ExecutionPlan(r=0, kernel="portable"), ExecutionPlan(kernel="native")):
        layer(torch.randn(6, 4), plan=plan)
    return seen, ops.wanted_kernel()


def test_the_kernel_of_a_plan_is_wanted_on_every_rank():
    for seen, after in run_ranks(kernels_of_plans, 2):
        assert seen == ["auto", "portable", "native"]
        assert after == "auto"
