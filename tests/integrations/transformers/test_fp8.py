"""FP8 experts: the stored weights times their scales, in a plain float64 loop."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

from flexpert import InputError
from flexpert.integrations.transformers import enable
from flexpert.testing import assert_close
from tests.integrations.transformers.zoo import D, E, F, of_this_release, routed


def build(block_size, **options):
    enable()

    class Experts(FP8Experts):
        """Decorating changes a class in place."""

    decorated = use_experts_implementation(Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E)
    config._experts_implementation = "flexpert"
    experts = decorated(config, block_size=block_size, **options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
            if weight.is_floating_point():
                weight.copy_(torch.randn(weight.shape, generator=g))
            scale.copy_(0.1 + torch.rand(scale.shape, generator=g) / 4)
    return experts


def widened(weight, scale, rows, columns):
    """Element by element: each has the scale of its block."""
    out, weight, scale = torch.zeros(weight.shape, dtype=torch.float64), weight.detach(), scale.detach()
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = float(weight[i, j]) * float(scale[i // rows, j // columns])
    return out


@pytest.mark.parametrize(
    ("block_size", "first", "second"),
    [
        ((8, 8), (8, 8), (8, 8)),
        ((7, 5), (7, 5), (7, 5)),  # the last blocks are smaller
        ((128, 128), (F, D), (D, F)),  # gate and up still have a scale each
        (None, (F, D), (D, F)),
    ],
)
def test_is_the_stored_weights_times_their_scales(block_size, first, second):
    experts, case = build(block_size), routed()
    x, weights = case.x.requires_grad_(), case.weights.requires_grad_()
    y = experts(x, case.ids, weights)
    y.backward(case.grad)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, weights))
    want = []
    for t in range(len(x)):
        total = torch.zeros(D, dtype=torch.float64)
        for k, e in enumerate(case.ids[t].tolist()):
            w1 = widened(experts.gate_up_proj[e], experts.gate_up_proj_scale_inv[e], *first)
            w2 = widened(experts.down_proj[e], experts.down_proj_scale_inv[e], *second)
            gate, up = (w1 @ exact_x[t]).chunk(2)
            total = total + exact_w[t, k] * (w2 @ (torch.nn.functional.silu(gate) * up))
        want.append(total)
    torch.stack(want).backward(case.grad.double())
    assert_close(y, torch.stack(want))
    assert_close(x.grad, exact_x.grad)
    assert_close(weights.grad, exact_w.grad)


@of_this_release
def test_weights_that_cannot_be_read_are_refused():
    case = routed()
    with pytest.raises(InputError, match="int8.*dequantize=True"):
        build((8, 8), expert_dtype="fp4")(case.x, case.ids, case.weights)
    with pytest.raises(InputError, match="activation_scheme='static'"):
        build((8, 8), activation_scheme="static")(case.x, case.ids, case.weights)


def test_wide_weights_take_the_ordinary_way():
    experts, case = build((8, 8)), routed()
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, torch.nn.Parameter(getattr(experts, name).float()))
    y = experts(case.x, case.ids, case.weights)
    y.sum().backward()
    assert experts.down_proj.grad.any()
