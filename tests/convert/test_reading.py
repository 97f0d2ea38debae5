"""MLPs are read as what they compute, whatever their class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexpert.convert import find_mlps
from flexpert.convert.reading import UnknownError, read_mlp, read_place

NAMES = {
    "llama": ("silu", True, True),
    "qwen3": ("silu", True, False),
    "phi3": ("silu", True, False),
    "gpt2": ("gelu_tanh", False, True),
    "bert": ("gelu", False, True),
    "vit": ("gelu", False, True),
    "swinv2": ("gelu", False, True),
    "plain": ("relu", False, True),
}


@pytest.mark.parametrize("name", NAMES)
def test_each_layout_is_read(name, make_case):
    case = make_case(name)
    found = {n: pair for n, pair in find_mlps(case.model).items() if "bias_mlp" not in n}
    assert len(found) == (3 if name == "swinv2" else 2)
    for mlp_name, (place, mlp) in found.items():
        assert (mlp.activation, mlp.gated, mlp.expert_bias) == NAMES[name]
        assert mlp.model_dim == mlp.output_dim
        x = torch.randn(5, mlp.model_dim)
        with torch.no_grad():
            y = case.model.get_submodule(mlp_name)(x)
            if place.identities:
                y = case.model.get_submodule(place.last)(y)
        torch.testing.assert_close(mlp(x), y, rtol=1e-4, atol=1e-5)


def test_dropout_of_the_output_is_seen(make_case):
    assert {place.dropout for place, _ in find_mlps(make_case("gpt2").model).values()} == {0.1}
    places = [place for place, _ in find_mlps(make_case("plain").model).values()]
    assert [(place.dropout, place.layer) for place in places] == [(0.2, "blocks.0.0"), (0.2, "blocks.1.0")]


def test_dropout_of_the_hidden_layer_is_seen():
    parts = [nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.3)]
    place, mlp = read(nn.Sequential(*parts))
    assert (mlp.dropout, place.dropout) == (pytest.approx(0.6), 0.3)
    assert mlp.neurons(torch.arange(3)).dropout == mlp.dropout


class Swapped(nn.Module):
    """A gated unit whose gate is the second of its modules, and whose activation is in its forward."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return self.w2(self.w1(x) * torch.tanh(self.w3(x)))


class Scaled(Swapped):
    def forward(self, x):
        return 2 * super().forward(x)


class NoTensor(Swapped):
    def forward(self, x):
        return super().forward(x), None


class Broken(Swapped):
    def forward(self, x):
        raise RuntimeError("wants a mask")


def read(module):
    model = nn.ModuleDict({"mlp": module})
    return read_mlp("mlp", module, model)


def test_gate_and_activation_are_found_by_what_they_do():
    place, mlp = read(Swapped())
    assert (place.first, place.last, mlp.activation) == (("mlp.w3", "mlp.w1"), "mlp.w2", "tanh")


def test_reading_leaves_the_module_alone():
    module = Swapped().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    read(module)
    assert module.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not module.w1._forward_pre_hooks


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Scaled(), "computes something else than an MLP of them"),
        (NoTensor(), "returns a tuple"),
        (Broken(), "cannot be called with tokens: wants a mask"),
        (nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 4)), None),
        (nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 4)), "computes something else"),
        (
            nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)),
            r"dropout 0.1 of something else than its hidden layer, and experts have none; set its p to 0",
        ),
        (Swapped().to("meta"), "on the meta device"),
    ],
)
def test_what_is_no_mlp(module, reason):
    if reason is None:  # has not even its parts
        assert not find_mlps(nn.ModuleDict({"mlp": module}))
        return
    with pytest.raises(UnknownError, match=reason):
        read(module)


def test_widths_of_two_modules_that_do_not_fit(make_case):
    model = make_case("bert").model
    model.encoder.layer[0].output.dense = nn.Linear(7, 16)
    with pytest.raises(UnknownError, match=r"widths do not fit: \(24, 16\), \(16, 7\)"):
        read_mlp("encoder.layer.0.intermediate", model.encoder.layer[0].intermediate, model)


def test_read_place_shares_memory_where_it_can(make_case):
    model = make_case("phi3").model
    place, _ = find_mlps(model)["model.layers.0.mlp"]
    mlp = read_place(model, place, "silu")
    assert mlp.w1.shape == (2, 24, 16)
    assert mlp.w1.data_ptr() == model.model.layers[0].mlp.gate_up_proj.weight.data_ptr()
