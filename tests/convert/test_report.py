"""Sizes against direct counts."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flexpert.convert import Clone, Importance, convert, measure_model
from flexpert.convert.report import rounding


def test_sizes_of_a_dense_model():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    sizes = measure_model(model)
    assert (sizes.params, sizes.active_params, sizes.flops) == (35, 35, 60)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3))
    assert sizes.flops == counter.get_total_flops()


def test_shared_parameters_count_once(make_case):
    model = make_case("qwen3").model
    assert measure_model(model).params == model.num_parameters()


@pytest.mark.parametrize(
    ("method", "active"),
    [(Clone(num_experts=4, top_k=2), 2 / 4), (Importance(num_experts=6, num_shared=2, top_k=3), 3 / 6)],
)
def test_sizes_before_and_after(make_case, method, active):
    case = make_case("llama")
    dense = measure_model(case.model)
    report = convert(case.model, case.glob, method, calibration=[case.batch])
    after = measure_model(case.model)
    assert (report.before, report.after) == (dense, after)
    assert after.params == sum(p.numel() for p in case.model.parameters())
    experts = sum(layer.mlp.experts.w1.numel() for layer in case.model.model.layers)
    experts += sum(
        p.numel()
        for layer in case.model.model.layers
        for p in (layer.mlp.experts.w2, layer.mlp.experts.b1, layer.mlp.experts.b2)
    )
    assert after.params - after.active_params == experts * (1 - active)
    for name, layer in report.layers.items():
        module = case.model.get_submodule(name)
        assert layer.after.params == sum(p.numel() for p in module.parameters())
        assert layer.after.active_params == module.num_active_params()
        assert layer.after.flops == module.flops_per_token()
        assert layer.before.flops == 2 * 3 * 16 * 24
    change = sum(layer.after.flops - layer.before.flops for layer in report.layers.values())
    assert after.flops - dense.flops == change


def test_text_and_json(make_case):
    case = make_case("llama")
    report = convert(case.model, "*.0.mlp", Clone(num_experts=4, redraw=0.5))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["exact"] is report.exact is False
    assert (
        data["layers"]["model.layers.0.mlp"]["after"]["params"]
        == report.layers["model.layers.0.mlp"].after.params
    )
    text = str(report)
    assert "clone: 1 layers; other outputs: redraw=0.5 changed the experts' weights" in text
    assert "model.layers.0.mlp (4 experts of 24, top-1)" in text
    exact = convert(case.model, "*.1.mlp", Clone(num_experts=2))
    assert "the same outputs as before" in str(exact)


def test_units():
    from flexpert.convert.report import _short

    assert [_short(n) for n in (999, 1234, 5_678_000, 2 * 10**9)] == ["999", "1.234k", "5.678M", "2G"]


def test_rounding_grows_with_coarser_dtypes():
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    limits = [rounding(dtype) for dtype in dtypes]
    assert limits == sorted(limits)
    assert limits[1] == 1e-5
