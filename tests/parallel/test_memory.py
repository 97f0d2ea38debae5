"""What an exchange lets go of while rows are still under way."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

from flexpert.parallel.all_to_all import PendingRows
from flexpert.parallel.hierarchical import Hierarchical
from flexpert.parallel.pending import Pending
from flexpert.parallel.pipeline import Exchange, run
from flexpert.parallel.routes import Arrivals, RaggedRoutes
from flexpert.parallel.splits import Splits


class Loopback:
    """Rows arrive where they were sent from; it notes which earlier ones somebody still holds then."""

    def __init__(self):
        self.arrived, self.held = [], []

    def start(self, rows, splits, *, reverse, **options):
        output = rows.clone()
        self.arrived.append(weakref.ref(output))

        def arrive():
            if reverse:
                self.held = [ref() is not None for ref in self.arrived[:-1]]
            return output

        return PendingRows(arrive)


def test_backward_holds_nothing_of_a_chunk_whose_gradients_travel_home():
    arrivals = Arrivals(Splits([[5]], [[5]]), degree=1)
    routes = RaggedRoutes(arrivals, lambda: torch.tensor([[0]]), in_order=True)
    algorithm = Loopback()
    exchange = Exchange(
        name="test",
        algorithm=algorithm,
        routes=routes,
        codec="none",
        compute=lambda rows, unit, counts, w: (rows @ w).relu(),
        output_dim=3,
    )
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    run(exchange, x, [w]).sum().backward()
    want = torch.autograd.grad((x @ w).relu().sum(), [x, w])
    assert torch.equal(x.grad, want[0])
    assert torch.equal(w.grad, want[1])
    assert len(algorithm.arrived) == 4  # there and back, forward and backward
    assert algorithm.held == [False, False, False]


@pytest.mark.parametrize("way", ["_forth", "_back"])
def test_a_phase_of_the_hierarchical_exchange_lets_go_of_the_one_before(way):
    made = []

    def start(group, rows, chunk, **options):
        made.append(torch.zeros(4, 2))
        return made[-1], Pending("test")

    phase = SimpleNamespace(start=start)
    part = SimpleNamespace(
        forth=phase, forth_between=phase, back_between=phase, back=phase, sent_LN=[[2], [2]]
    )
    wire = torch.zeros(4, 2)
    phases = getattr(Hierarchical, way)(SimpleNamespace(inside=None, between=None), wire, part, 0)
    first = weakref.ref(wire)
    del wire
    next(phases)
    assert first() is None
    relayed = weakref.ref(made.pop())
    next(phases)
    assert relayed() is None
