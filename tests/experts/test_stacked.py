"""Equal modules, stacked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexpert import ConfigError, InputError, MoE
from flexpert.experts import ExpertBatch, ModuleExperts, StackedModules
from flexpert.routers import LinearRouter
from flexpert.testing import assert_close

D = 4


def make_modules(count=3):
    torch.manual_seed(0)
    return [
        nn.Sequential(
            nn.Linear(D, 5), nn.BatchNorm1d(5, dtype=torch.float64).eval(), nn.Linear(5, D)
        ).double()
        for _ in range(count)
    ]


def batch_of(counts, spare=0, slots=None):
    rows = torch.randn(sum(counts) + spare, D, dtype=torch.float64, requires_grad=True)
    return ExpertBatch(rows_ND=rows, counts_E=torch.tensor(counts), unit_N=None, slot_E=slots)


@pytest.mark.parametrize("counts", [[3, 2, 1], [0, 5, 0], [0, 0, 0]])
@pytest.mark.parametrize("slots", [None, [2, -1, 0]])
def test_as_the_modules_themselves(counts, slots):
    modules = make_modules()
    stacked, apart = StackedModules(modules, model_dim=D).eval(), ModuleExperts(modules, model_dim=D)
    batch = batch_of(counts, 2, None if slots is None else torch.tensor(slots))
    got, want = stacked(batch), apart(batch)
    assert_close(got, want)
    grad = torch.randn_like(want)
    parameters = [
        [m.get_parameter("0.weight") for m in apart.experts],
        [stacked.module.get_parameter("0.weight")],
    ]
    of_modules, of_stack = (
        torch.autograd.grad(y, [batch.rows_ND, *leaves], grad, allow_unused=True, materialize_grads=True)
        for y, leaves in ((want, parameters[0]), (got, parameters[1]))
    )
    assert_close(of_stack[0], of_modules[0])
    assert_close(of_stack[1], torch.stack(of_modules[1:]))


def test_tensors_are_stacked_and_the_modules_untouched():
    modules = make_modules()
    bank = StackedModules(modules, model_dim=D, slice_dims={"2.weight": 1}, once=["2.bias"])
    for name, tensor in bank.state_dict().items():
        own = [module.state_dict()[name.removeprefix("module.")] for module in modules]
        assert torch.equal(tensor, torch.stack(own))
    assert bank.layout().keys() == bank.state_dict().keys()
    assert (bank.layout()["module.2.weight"].slice_dim, bank.layout()["module.2.bias"].once) == (2, True)
    assert bank.layout()["module.0.weight"].slice_dim is None
    assert bank.params_of_experts() == [sum(p.numel() for p in modules[0].parameters())] * 3
    assert bank.flops_of_experts() == [4 * D * 5] * 3


def test_in_a_layer():
    router = LinearRouter(model_dim=D, num_experts=3, top_k=2)
    modules = make_modules()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    layers = [
        MoE(router=router, experts=kind(modules, model_dim=D)) for kind in (StackedModules, ModuleExperts)
    ]
    got, want = (layer.double().eval()(x) for layer in layers)
    assert_close(got, want)


def test_a_module_that_writes_its_buffers_is_refused():
    counts = [2, 3, 2]
    bank = StackedModules(make_modules(), model_dim=D).train()
    with pytest.raises(InputError, match=r"writes to its buffer '1[.].*call eval"):
        bank(batch_of(counts))
    with torch.inference_mode():
        bank.eval()(batch_of(counts))


def tied():
    module = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    module[1].weight = module[0].weight
    return module


@pytest.mark.parametrize(
    ("modules", "options", "words"),
    [
        ([], {}, "experts is empty"),
        (
            [nn.Linear(D, D), nn.Linear(D, D, bias=False)],
            {},
            "module 1 differs from module 0 in more than values",
        ),
        ([nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU())], {}, "unlike modules into ModuleExperts"),
        ([tied()], {}, "1.weight share memory"),
        ([nn.Linear(D, D)], {"slice_dims": {"wieght": 0}}, "no 'wieght'; it has bias, weight"),
        ([nn.Linear(D, D)], {"slice_dims": {"weight": 2}}, r"slice_dims\['weight'\]=2"),
        ([nn.Linear(D, D)], {"slice_dims": {"bias": 0}, "once": ["bias"]}, "not in once"),
    ],
)
def test_what_cannot_be_stacked_is_refused(modules, options, words):
    with pytest.raises(ConfigError, match=words):
        StackedModules(modules, model_dim=D, **options)
