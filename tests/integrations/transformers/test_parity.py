"""The experts implementation against eager, for every decorated class of the installed release."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from flexpert.integrations.transformers import enable
from flexpert.integrations.transformers.layout import check_layout, fused_activation
from flexpert.ops.cpu.build import native
from flexpert.testing import relative_error
from tests.integrations.transformers.zoo import (
    D,
    E,
    F,
    build_experts,
    experts_classes,
    of_this_release,
    randomised,
    routed,
)

# Classes whose layout, gate or activation is not the common one: our operators run them one by one.
UNFUSED = {
    "AriaExperts": "weights are transposed",
    "BeamExperts": "its gate multiplies in fp32",
    "DeepseekV4Experts": "its gate clamps",
    "Glm5NextTextExperts": "its gate clamps",
    "GptOssExperts": "weights are transposed, gate and up interleaved, the gate clamps",
    "HYV4Experts": "its gate clamps",
    "Inkling2Experts": "its gate has soft caps",
    "MiniMaxM3VLExperts": "its gate clamps",
    "MuseSparkExperts": "results are normalised",
    "OpenAIPrivacyFilterExperts": "weights are transposed, the gate clamps",
}
# Classes that cannot be compared with eager, and why. None in the release this was written for.
EXCEPTIONS: dict[str, str] = {}
KINDS = sorted(set(experts_classes()) - EXCEPTIONS.keys())


@pytest.fixture(autouse=True, scope="module")
def _enabled():
    enable()


def run(experts, case, implementation):
    """The output and every gradient by name."""
    experts.config._experts_implementation_internal = implementation
    experts.zero_grad()
    x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    y = experts(x, case.ids, weights)
    y.backward(case.grad.to(y.dtype))
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"y": y.detach(), "d_x": x.grad, "d_weights": weights.grad, **gradients}


def truth_of(experts, case):
    """Eager in float64."""
    exact = copy.deepcopy(experts).double()
    case = copy.copy(case)
    case.x, case.weights, case.grad = case.x.double(), case.weights.double(), case.grad.double()
    return run(exact, case, "eager")


@of_this_release
def test_how_many_classes_there_are():
    assert len(experts_classes()) == 65
    assert EXCEPTIONS.keys() | UNFUSED.keys() <= experts_classes().keys(), "an exception is stale"


@pytest.mark.parametrize("name", KINDS)
def test_every_class_in_fp32(name):
    experts, case = build_experts(experts_classes()[name]), routed()
    check_layout(experts, name)
    assert (fused_activation(experts) is None) == (name in UNFUSED)
    truth, got = truth_of(experts, case), run(experts, case, "flexpert")
    assert got.keys() == truth.keys()
    for key, value in truth.items():
        assert got[key].dtype is torch.float32
        assert relative_error(got[key], value) < 2e-6, key


@pytest.mark.parametrize("name", KINDS)
def test_every_class_in_bf16_errs_about_as_much_as_eager(name):
    experts = build_experts(experts_classes()[name], torch.bfloat16)
    case = routed(dtype=torch.bfloat16)
    truth, eager = truth_of(experts, case), run(experts, case, "eager")
    got = run(experts, case, "flexpert")
    # The portable operators round the gradients of routing weights once more.
    factor = 1.3 if native().library is not None else 2.0
    # The one class that computes in fp32 itself is held to the rounding of bf16.
    least = 8e-3 if name == "OpenAIPrivacyFilterExperts" else 2e-3
    for key, value in truth.items():
        assert got[key].dtype is eager[key].dtype
        allowed = factor * max(relative_error(eager[key], value), least)
        assert relative_error(got[key], value) < allowed, key


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("absent", [E, E + 7])
def test_experts_of_other_ranks_are_skipped(name, absent):
    """Absent choices weigh 0; eager computes them as expert 0 with that weight."""
    experts, case = build_experts(experts_classes()[name]), routed()
    elsewhere = torch.rand(case.ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    elsewhere[3] = True  # a token with no expert here
    case.weights = case.weights.masked_fill(elsewhere, 0.0)
    ids, case.ids = case.ids, case.ids.masked_fill(elsewhere, 0)
    truth = truth_of(experts, case)
    case.ids = ids.masked_fill(elsewhere, absent)
    got = run(experts, case, "flexpert")
    truth["d_weights"] = truth["d_weights"].masked_fill(elsewhere, 0.0)
    for key, value in truth.items():
        assert relative_error(got[key], value) < 2e-6, key
    case.x[3] = torch.nan
    with_nan = run(experts, case, "flexpert")
    assert all(torch.equal(with_nan[key], got[key]) for key in ("y", "gate_up_proj") if key in got)


LAYOUTS = ["MixtralExperts", "AriaExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_token(name):
    experts, case = build_experts(experts_classes()[name]), routed(1)
    truth, got = truth_of(experts, case), run(experts, case, "flexpert")
    for key, value in truth.items():
        assert relative_error(got[key], value) < 2e-6, key


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_token_leaves_every_gradient_zero(name):
    """Eager has no gradient to give then; a rank without tokens still takes part in a reduction."""
    got = run(build_experts(experts_classes()[name]), routed(0), "flexpert")
    assert got["y"].shape == (0, 16)
    assert all(not value.any() for value in got.values())


FUSED_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "identity",
}


@pytest.mark.parametrize(
    "act", [*FUSED_ACTIVATIONS, "quick_gelu", "mish", "gelu_10", "laplace", "a function"]
)
@pytest.mark.parametrize("name", ["MixtralExperts", "NemotronHExperts"])
def test_every_activation(name, act):
    """Known ones by their name here, any other as the function it is."""
    experts, case = build_experts(experts_classes()[name]), routed()
    del experts.act_fn
    experts.act_fn = torch.nn.functional.softplus if act == "a function" else ACT2FN[act]
    assert fused_activation(experts) == FUSED_ACTIVATIONS.get(act)
    truth, got = truth_of(experts, case), run(experts, case, "flexpert")
    for key, value in truth.items():
        assert relative_error(got[key], value) < 4e-6, key


@use_experts_implementation(has_bias=True)
class BiasedExperts(nn.Module):
    """No class of the release has biases in the common layout."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = E
        for name, shape in BIASED.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.act_fn = ACT2FN["silu"]

    def forward(self, x, ids, weights):
        rows = []
        for t in range(len(x)):
            total = torch.zeros_like(x[t])
            for k, e in enumerate(ids[t].tolist()):
                pre = nn.functional.linear(x[t], self.gate_up_proj[e], self.gate_up_proj_bias[e])
                hidden = self._apply_gate(pre)
                y = nn.functional.linear(hidden, self.down_proj[e], self.down_proj_bias[e])
                total = total + y * weights[t, k]
            rows.append(total)
        return torch.stack(rows)


BIASED = {
    "gate_up_proj": (E, 2 * F, D),
    "gate_up_proj_bias": (E, 2 * F),
    "down_proj": (E, D, F),
    "down_proj_bias": (E, D),
}


def test_biases_in_the_common_layout():
    experts, case = randomised(BiasedExperts(SimpleNamespace(_experts_implementation="eager"))), routed()
    check_layout(experts, "biased")
    assert fused_activation(experts) == "silu"
    exact = copy.copy(case)
    exact.x, exact.weights, exact.grad = case.x.double(), case.weights.double(), case.grad.double()
    experts.config._experts_implementation = "eager"
    truth = run(experts.double(), exact, "eager")
    experts.config._experts_implementation = "flexpert"
    got = run(experts.float(), case, "flexpert")
    for key, value in truth.items():
        want = torch.zeros_like(got[key]) if value is None else value
        assert relative_error(got[key], want) < 2e-6, key
