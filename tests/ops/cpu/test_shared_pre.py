"""What one backend saves in forward, another may read in backward."""

from __future__ import annotations

import pytest
import torch

from flexpert.ops import portable_mlp, waves
from flexpert.ops.cpu import backend

pytestmark = [pytest.mark.usefixtures("live", "poisoned"), pytest.mark.each_cap]
MODULES = {"native": backend, "portable": portable_mlp}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("forward", MODULES)
def test_gradients_do_not_depend_on_who_saved(make_case, monkeypatch, forward, gated, dtype):
    monkeypatch.setattr(waves, "WAVE_ROWS", 40)
    case = make_case(
        tokens=25, counts=(9, 3, 0, 33, 9, 1, 45, 17), slots=(0, 1, 2, -1, 1, 2, 0, 3), spare=6, gated=gated,
        dtype=dtype,
    )  # fmt: skip
    dy = torch.randn(case.x_TD.shape).to(dtype)
    inputs = (case.x_TD, case.unit_N, case.weight_N, case.counts_E, case.slot_E, case.w1, case.w2, case.b2)
    with torch.no_grad():
        for name, module in MODULES.items():
            _, pre = MODULES[forward].grouped_mlp(*case.args, save=True)
            _, own = module.grouped_mlp(*case.args, save=True)
            got = module.grouped_mlp_backward(dy, pre, *inputs, case.activation, [True] * 6)
            want = module.grouped_mlp_backward(dy, own, *inputs, case.activation, [True] * 6)
            for mine, true in zip(got, want, strict=True):
                error = (mine.double() - true.double()).norm() / true.double().norm()
                assert error <= 2 * torch.finfo(dtype).eps, name
