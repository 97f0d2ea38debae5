"""Activity of hidden neurons against a direct computation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexpert import ConfigError, InputError
from flexpert.convert import find_mlps, neuron_importance


def test_mean_absolute_activation(make_case):
    model = make_case("plain").model.train()
    model.blocks[1][3].eval()
    places = [place for place, _ in find_mlps(model).values()]
    x, more = torch.randn(3, 4, 12), torch.randn(2, 12)
    got = neuron_importance(model, places, [x, (more,), {"x": more}])
    first = model.blocks[0]
    rows = torch.cat([x.flatten(0, 1), more, more])
    want = first[1](first[0](rows)).abs().double().mean(0)
    torch.testing.assert_close(got["blocks.0"], want.detach())
    assert got["blocks.1"].shape == (24,)
    assert [module.training for module in (model, *model.blocks[1])] == [True, True, True, True, False]
    assert not model.blocks[0][2]._forward_pre_hooks


def test_without_batches_or_tokens(make_case):
    model = make_case("plain").model
    places = [place for place, _ in find_mlps(model).values()]
    with pytest.raises(ConfigError, match="calibration has no batch"):
        neuron_importance(model, places, [])
    model.blocks = model.blocks[:1]
    extra = nn.ModuleDict(
        {"model": model, "unused": nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))}
    )
    extra.forward = model.forward
    places = [place for place, _ in find_mlps(extra).values()]
    with pytest.raises(InputError, match="no token reached unused in the calibration"):
        neuron_importance(extra, places, [torch.randn(2, 12)])
