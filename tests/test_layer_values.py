"""The layer's values: dtypes, autocast, derivatives, and what is no number."""

from __future__ import annotations

import pytest
import torch

from flexpert import FlexpertError, ops
from flexpert.testing import assert_close
from tests.layers import ROUTERS, E, context_for, data, make_layer

# Dtypes ----------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("module", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("router", ["linear", "cosine", "expert_choice", "soft", "sigmoid"])
def test_output_has_the_dtype_of_the_input(router, given, module):
    layer = make_layer(router, dtype=module, num_shared_experts=1, losses=["balance"])
    x = data(9, dtype=given).requires_grad_()
    y, info = layer(x, return_info=True)
    assert y.dtype == given
    routing = torch.float64 if given is torch.float64 else torch.float32
    weights = info.routing.combine_BSP if router == "soft" else info.routing.weight_N
    assert weights.dtype == info.routing.probs_TE.dtype == info.losses["balance"].dtype == routing
    (y.float().sum() + info.losses["balance"]).backward()
    assert x.grad.dtype == given
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == module, name
        assert parameter.grad.dtype == module, name


@pytest.mark.parametrize("router", ["linear", "cosine", "expert_choice", "soft"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast(router, given):
    layer, x = make_layer(router, num_shared_experts=1, shared_gate=True), data(30, dtype=given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, info = layer(x, return_info=True)
        y.float().square().sum().backward()
    assert y.dtype == given
    plain, plain_info = layer(x, return_info=True)
    assert_close(y, plain.float(), 3e-2)
    assert info.routing.probs_TE.dtype == torch.float32
    assert torch.equal(info.routing.probs_TE, plain_info.routing.probs_TE)
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_autocast_leaves_fp64_alone():
    layer, x = make_layer(dtype=torch.float64), data(9, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("router", "expert"), [("linear", "mlp"), ("cosine", "glu"), ("soft", "mlp"), ("sigmoid", "glu")]
)
def test_gradients_in_fp64(router, expert, fused):
    layer = make_layer(
        router, torch.float64, expert=expert, num_shared_experts=1, shared_gate=True, activation="silu"
    )
    layer.transport.fused = layer.transport.fused and fused
    x = data(4, dtype=torch.float64).requires_grad_()

    def call(x, *_):
        return layer(x)

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("fused", [True, False])
def test_second_derivatives_are_refused_or_right(fused):
    layer = make_layer(dtype=torch.float64, activation="silu", top_k=2)
    layer.transport.fused = fused
    x = data(3, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(FlexpertError, match=r"cannot be differentiated twice.*use_backend\('reference'\)"):
        grad.sum().backward()
    with ops.use_backend("reference"):
        assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


# Values that are no numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("router", [r for r in ROUTERS if r not in ("soft", "expert_choice")])
def test_what_is_no_number_stays_in_its_token(router, value, fused):
    layer, x = make_layer(router).eval(), data(12)
    layer.transport.fused = fused
    y = layer(x, context=context_for(x))
    x[5, 2] = value
    broken, info = layer(x, context=context_for(x), return_info=True)
    others = [t for t in range(12) if t != 5]
    # Rows of other tokens meet in other products, so that sums may be taken in another order.
    assert_close(broken[others], y[others])
    assert 0 < info.routing.counts_E.sum() <= 12 * E
    assert ((info.routing.unit_N >= 0) & (info.routing.unit_N < 12)).all()


@pytest.mark.parametrize("prioritized", [False, True])
def test_what_is_no_number_under_a_capacity(prioritized):
    layer, x = make_layer(capacity_factor=0.5, batch_prioritized=prioritized), data(30)
    x[5] = float("nan")
    y, info = layer(x, return_info=True)
    others = [t for t in range(30) if t != 5]
    assert y[others].isfinite().all()
    assert (info.routing.counts_E <= info.routing.capacity_E).all()


def test_expert_choice_keeps_it_in_its_token_as_well():
    layer, x = make_layer("expert_choice", capacity_factor=1.0), data(30)
    x[5] = float("nan")
    others = [t for t in range(30) if t != 5]
    assert layer(x)[others].isfinite().all()
