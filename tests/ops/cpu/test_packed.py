"""The native MLP on packed weights: the results of unpacked ones, on every set of instructions."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from flexpert import InputError, ops
from flexpert.ops import packing, reference
from tests.ops.conftest import relative_error

pytestmark = [pytest.mark.usefixtures("live"), pytest.mark.each_cap]

EPS = torch.finfo(torch.bfloat16).eps


def packed_args(case):
    w1, w2 = packing.pack_mlp(case.w1.detach(), case.w2.detach())
    before = case.x_TD, case.unit_N, case.weight_N, case.counts_E, case.slot_E, w1, case.b1, w2, case.b2
    return *before, case.w2.shape[2], case.w2.shape[1], case.activation


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", [(17, 33, None), (32, 64, 31), (96, 32, 65)])
def test_packed_weights_give_what_others_give(make_case, sizes, gated):
    model_dim, hidden_dim, output_dim = sizes
    counts_of = [(1, 2, 3, 4, 5), (16, 0, 17, 33), (17, 0, 33), (600, 0, 70)]
    for counts, biases, slots in product(counts_of, (True, False), (False, True)):
        case = make_case(
            dtype=torch.bfloat16, tokens=50, counts=counts, spare=3, gated=gated, biases=biases,
            model_dim=model_dim, hidden_dim=hidden_dim, output_dim=output_dim,
            **({"slots": (len(counts) - 1, -1, *range(len(counts) - 2))} if slots else {}),
        )  # fmt: skip
        with torch.no_grad():
            got = ops.grouped_mlp_packed(*packed_args(case))
            plain = ops.grouped_mlp(*case.args)
            true = reference.grouped_mlp(*case.double().args)
        assert relative_error(got, true) <= max(2 * EPS, 1.01 * relative_error(plain, true))
        if counts[0] > 16:  # of all experts more than are streamed
            assert torch.equal(got, plain)


def test_bits_do_not_depend_on_threads(make_case, threads):
    for counts in [(1, 5, 3, 16), (40, 3, 600)]:
        case = make_case(
            dtype=torch.bfloat16, tokens=64, counts=counts, model_dim=64, hidden_dim=96, gated=True
        )
        args, found = packed_args(case), []
        for number in (1, 2, 3):
            threads(number)
            with torch.no_grad():
                found.append(ops.grouped_mlp_packed(*args))
        assert all(torch.equal(y, found[0]) for y in found)


def test_other_shapes_are_refused(make_case):
    case = make_case(dtype=torch.bfloat16, model_dim=64, hidden_dim=64)
    args = list(packed_args(case))
    if packing.why_not(torch.device("cpu"), torch.bfloat16) is not None:
        pytest.skip("unpacked first, by a portable function")
    args[9] = 65
    with pytest.raises(InputError, match="w1 has shape"):
        ops.grouped_mlp_packed(*args)
