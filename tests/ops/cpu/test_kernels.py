"""The native grouped MLP by its relative error, which grows with small systematic ones; and its refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from flexpert import ops
from flexpert.core.errors import ConfigError, InputError
from flexpert.ops import ACTIVATIONS, reference
from flexpert.ops.cpu import backend
from flexpert.ops.cpu.layer import NAMES

pytestmark = pytest.mark.usefixtures("live")

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = {
    "ragged": {"counts": (3, 0, 5, 1)},
    "one token": {"tokens": 1, "counts": (0, 1, 1)},
    "no token": {"tokens": 0, "counts": (0, 0, 0)},
    "no experts' rows": {"counts": (0, 0), "spare": 3},
    "all to one": {"tokens": 40, "counts": (0, 0, 300), "model_dim": 64, "hidden_dim": 96},
    "several waves": {"tokens": 70, "counts": (700, 31, 0, 400, 33, 900), "model_dim": 40, "hidden_dim": 72},
    "hidden layer in spans": {"tokens": 40, "counts": (5, 40, 33, 1), "model_dim": 40, "hidden_dim": 530},
    "gradients of four blocks of rows": {"tokens": 64, "counts": (1100,), "model_dim": 480, "hidden_dim": 40},
    "absent experts": {"counts": (3, 2, 0, 4, 1), "slots": (1, -1, -1, 0, 2), "spare": 2},
    "shared slots": {"counts": (3, 20, 4, 9), "slots": (0, 1, 0, 0)},
    "no biases, no weights": {"biases": False, "weighted": False, "spare": 1},
    "255": {"tokens": 255, "counts": (255, 1, 254), "model_dim": 255, "hidden_dim": 255, "output_dim": 17},
    "wide": {"tokens": 33, "counts": (17, 0, 33), "model_dim": 520, "hidden_dim": 300, "output_dim": 270},
}  # fmt: skip


def check(assert_same, case):
    true = case.double()
    assert_same(
        lambda: ops.grouped_mlp(*case.args),
        lambda: reference.grouped_mlp(*true.args),
        case.leaves,
        true.leaves,
    )


def test_names_are_those_of_python():
    assert list(NAMES) == sorted(ACTIVATIONS)


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(make_case, assert_same, activation, gated, dtype):
    check(assert_same, make_case(activation=activation, gated=gated, dtype=dtype, counts=(30, 0, 50, 1)))


@pytest.mark.each_cap
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_hold_far_out_and_near_zero(activation):
    """One hidden unit per value, identity weights: act(x) and act'(x) from -40 to 40 and around zero."""
    values = torch.cat([torch.linspace(-40, 40, 500), torch.linspace(-1e-3, 1e-3, 101)])
    x = values[:, None].clone().requires_grad_()
    one, rows = torch.ones(1, 1, 1), torch.arange(len(x))
    y = ops.grouped_mlp(x, rows, None, torch.tensor([len(x)]), None, one, None, one, None, activation)
    (slope,) = torch.autograd.grad(y.sum(), x)
    wide = values.double().requires_grad_()
    want = ACTIVATIONS[activation].forward(wide)
    (want_slope,) = torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(y[:, 0].double(), want, rtol=3e-6, atol=1e-9)
    torch.testing.assert_close(slope[:, 0].double(), want_slope, rtol=3e-6, atol=1e-6)


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(make_case, assert_same, poisoned, shape, gated, dtype):
    check(assert_same, make_case(**SHAPES[shape], gated=gated, dtype=dtype))


@pytest.mark.each_cap
@pytest.mark.parametrize("factor", [1.0, 1.3, 1.5])
def test_bf16_is_rounded_as_pytorch_rounds(factor):
    """To the nearest, ties to the even one (half of the products with 1.5); a NaN stays one."""
    far = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.3e38, -3.3e38, 2e38, 1e-30, 0.0])
    x = torch.cat([torch.randn(999), far]).bfloat16()[:, None]
    w, counts = torch.full((1, 1, 1), factor).bfloat16(), torch.tensor([len(x)])
    _, pre = torch.ops.flexpert.grouped_mlp(
        x, torch.arange(len(x)), None, counts, None, w, None, w, None, "identity", True
    )
    want = (x.float() * w[0].float()).bfloat16()
    assert torch.equal(pre[: len(x)].nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
    assert torch.equal(pre[: len(x)].isnan(), want.isnan())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"unit_N": torch.full((9,), 7)}, r"unit_N has an index outside \[0, T\)"),
        ({"counts_E": torch.tensor([3, 0, 5, 2])}, "more rows than unit_N has"),
        ({"slot_E": torch.tensor([0, 1, 2, 4])}, r"slot outside \[-1, S\)"),
        ({"w2": torch.ones(4, 17, 32)}, "w1 has shape"),
        ({"b2": torch.ones(4, 16)}, "b2 has shape"),
        ({"b1": torch.ones(4, 33, dtype=torch.bfloat16)}, "b1 has dtype"),
        ({"weight_N": torch.ones(8)}, "weight_N has shape"),
        ({"counts_E": torch.tensor([9])}, "counts_E has shape"),
    ],
)
def test_bad_arguments_are_named(make_case, change, error):
    case = replace(make_case(dtype=torch.float32), **change)
    with pytest.raises(InputError, match=error):
        ops.grouped_mlp(*case.args)


@pytest.mark.parametrize("name", ["unit_N", "weight_N", "counts_E", "w1", "b1", "w2", "b2"])
def test_tensors_elsewhere_are_named(make_case, name):
    """By the kernel, and by the operator, which also refuses them where nobody wants gradients."""
    case = make_case(dtype=torch.float32)
    case = replace(case, **{name: getattr(case, name).to("meta")})
    with pytest.raises(InputError, match=f"grouped_mlp: {name} is on meta, x on cpu"):
        backend.grouped_mlp(*case.args, False)
    with torch.no_grad(), pytest.raises(InputError, match="grouped_mlp: tensors on .*meta"):
        ops.grouped_mlp(*case.args)


@pytest.mark.parametrize("change", ["fewer rows", "narrow", "dtype"])
def test_what_backward_is_given_must_be_what_forward_kept(make_case, change):
    case = make_case(dtype=torch.float32)
    operators, weights = torch.ops.flexpert, (case.w1, case.w2, case.b2, case.activation, [True] * 6)
    y, pre = operators.grouped_mlp(*case.args, True)
    pre = {"fewer rows": pre[1:], "narrow": pre[:, 1:], "dtype": pre.bfloat16()}[change]
    with pytest.raises(InputError, match="grouped_mlp: pre has"):
        operators.grouped_mlp_backward(torch.ones_like(y), pre.detach(), *case.args[:5], *weights)


def test_operators_without_a_native_kernel_run(make_case):
    case = make_case(dtype=torch.float32)
    rows = ops.gather_rows(case.x_TD, case.unit_N, case.counts_E)
    assert torch.equal(rows, case.x_TD[case.unit_N])
    with pytest.raises(InputError, match="native: has no kernels for torch.float64"):
        ops.grouped_mlp(*case.double().args)


def test_unknown_activation(make_case):
    with pytest.raises(ConfigError, match="'swish' is unknown"):
        ops.grouped_mlp(*make_case(dtype=torch.float32, activation="swish").args)


def test_the_first_call_of_a_process_may_have_no_rows():
    """It needs no memory at all, and nothing is kept yet."""
    script = (
        "import torch; from flexpert import MoE, MoEConfig\n"
        "moe = MoE(MoEConfig(model_dim=32, hidden_dim=32, num_experts=2))\n"
        "assert moe(torch.randn(0, 32)).shape == (0, 32)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
