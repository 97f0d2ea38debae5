"""The hidden layer computed again in backward by the native kernels."""

from __future__ import annotations

import pytest
import torch

from flexpert import ops
from flexpert.ops.cpu.layer import NAMES
from tests.ops.cpu.test_kernels import SHAPES

pytestmark = pytest.mark.usefixtures("live")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits(make_case, assert_recomputes, poisoned, shape, gated, dtype):
    assert_recomputes(make_case(**SHAPES[shape], gated=gated, dtype=dtype))


@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(make_case, assert_recomputes, activation):
    assert_recomputes(make_case(activation=activation, counts=(30, 0, 50, 1), dtype=torch.float32))


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_small_experts_and_threads(make_case, assert_recomputes, threads, dtype):
    case = make_case(tokens=70, counts=(3, 40, 1, 0, 65) * 6, spare=4, gated=True, dtype=dtype)
    for number in (1, 2):
        threads(number)
        assert_recomputes(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(make_case, assert_recomputes, dtype):
    torch._dynamo.reset()
    case = make_case(tokens=9, counts=(8, 0, 17), gated=True, dtype=dtype)
    call = torch.compile(ops.grouped_mlp, fullgraph=True, backend="aot_eager")
    assert_recomputes(case, call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(make_case, gated, dtype):
    case = make_case(counts=(4, 0, 7), slots=(1, 0, -1), spare=2, gated=gated, dtype=dtype)
    torch.library.opcheck(torch.ops.flexpert.grouped_mlp, (*case.args, False, True))
    args = case.x_TD, case.unit_N, case.counts_E, case.slot_E, case.w1, case.b1
    with torch.no_grad():
        torch.library.opcheck(torch.ops.flexpert.grouped_mlp_pre, args)
