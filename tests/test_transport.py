"""The layer's way for few tokens: the same results, and only where nobody needs what it leaves out."""

from __future__ import annotations

import pytest
import torch

from flexpert import RoutingContext, ops, routing_scope
from flexpert.routers import LinearRouter
from tests.layers import D, data, make_layer


@pytest.fixture
def calls(monkeypatch):
    """Calls of `ops.routed_mlp`."""
    made, function = [], ops.routed_mlp

    def spy(*args):
        made.append(args)
        return function(*args)

    monkeypatch.setattr(ops, "routed_mlp", spy)
    return made


LAYERS = {
    "plain": {},
    "glu": {"expert": "glu", "activation": "silu", "renormalize": True, "num_shared_experts": 1},
    "capacity": {"capacity_factor": 1.0, "batch_prioritized": True},
    "sigmoid": {"router": "sigmoid"},
    "noisy": {"router": "noisy"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_the_result_is_that_of_all_parts(calls, name, dtype):
    layer = make_layer(dtype=dtype, **LAYERS[name]).eval()
    if layer.router.selection_bias is not None:
        layer.router.selection_bias.copy_(torch.linspace(-1, 1, layer.router.num_experts))
    for shape in ((1,), (2, 3)):
        x = data(*shape, dtype=dtype)
        with torch.no_grad():
            y, again = layer(x), layer(x, top_k=1, capacity_factor=2.0)
            assert len(calls) == 2
            want, _ = layer(x, return_info=True)
            assert torch.equal(y, want)
            assert torch.equal(again, layer(x, top_k=1, capacity_factor=2.0, return_info=True)[0])
        assert len(calls) == 2
        calls.clear()


class Mine(LinearRouter):
    """A class of one's own."""

    def score(self, x_TD, context):
        return -super().score(x_TD, context)


def test_not_taken_where_parts_do_more(calls):
    layer, x = make_layer().eval(), data(4)
    with torch.no_grad():
        want = layer(x, return_info=True)[0]
        seen = []
        handle = layer.router.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(layer(x), want)
        handle.remove()
        assert seen == [1]
        layer.router.forward = lambda *args: seen.append(2) or LinearRouter.forward(layer.router, *args)
        assert torch.equal(layer(x), want)
        del layer.router.forward
        assert seen == [1, 2]
        with routing_scope(layer) as scope:
            assert torch.equal(layer(x), want)
        assert len(scope.infos) == 1
        masked = RoutingContext(mask=torch.tensor([True, False, True, True]))
        assert layer(x, context=masked)[1].count_nonzero() == 0
        layer(x, context=RoutingContext(ranks=(0, 2)))
        layer(data(65))
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer(x.bfloat16())
        mine = make_layer().eval()
        mine.router = Mine(model_dim=D, num_experts=layer.router.num_experts, top_k=2)
        assert torch.equal(mine(x), mine(x, return_info=True)[0])
        noisy = make_layer("noisy")  # in training
        noisy(x, context=RoutingContext(step=1))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), want)
    layer(x)
    assert not calls


def test_what_a_call_asks_for_in_vain_is_refused_as_ever():
    layer = make_layer().eval()
    with torch.no_grad(), pytest.raises(Exception, match="top_k=99"):
        layer(data(2), top_k=99)
