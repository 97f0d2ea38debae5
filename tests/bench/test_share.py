"""The share of a layer's time that is not its experts'."""

from __future__ import annotations

import pytest
import torch

from flexpert.bench.implementations import DECODE, FORWARD, OURS
from flexpert.bench.share import routing_percent
from flexpert.testing import assert_close

(IN_ORDER,) = (item for item in OURS if item.name == "flexpert rows")


def test_the_share_is_that_of_the_median_turn():
    times = {"flexpert layer": [10.0, 20.0, 10.0, 10.0], "flexpert rows": [9.0, 18.0, 2.0], "flexpert": [8.0]}
    assert routing_percent(times, FORWARD) == pytest.approx(10.0)
    assert routing_percent(times, DECODE) == pytest.approx(20.0)
    assert routing_percent({"flexpert layer": [1.0]}, FORWARD) is None


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("gated", [False, True])
def test_rows_in_order_are_the_experts_alone(make, gated, capacity_factor):
    problem = make(gated=gated, capacity_factor=capacity_factor, activation="silu")
    out = IN_ORDER.build(problem)()
    assert not out.requires_grad
    flat = problem.id_TK.reshape(-1)
    kept = torch.argsort(flat, stable=True)[: problem.rows]
    want, x = [], problem.x_TD.detach()
    for row in kept.tolist():
        expert, token = int(flat[row]), row // problem.shape.top_k
        pre = problem.w1[expert] @ x[token]
        hidden = torch.nn.functional.silu(pre)
        if gated:
            hidden = torch.nn.functional.silu(pre[0]) * pre[1]
        want.append(problem.w2[expert] @ hidden)
    wanted = torch.stack(want)
    assert_close(out, wanted.detach(), 1e-5)
    grads = [problem.w1.grad, problem.w2.grad]
    for weight in (problem.w1, problem.w2):
        weight.grad = None
    wanted.backward(problem.grad_TD[kept // problem.shape.top_k])
    assert_close(grads[0], problem.w1.grad, 1e-5)
    assert_close(grads[1], problem.w2.grad, 1e-5)
