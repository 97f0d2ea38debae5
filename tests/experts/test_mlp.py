"""MLP and GLU banks against one nn.Linear after the other; their initial weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from flexpert import ConfigError, MoE, MoEConfig
from flexpert.core.routing import Routing
from flexpert.experts import ExpertBatch, GLUExperts, MLPExperts
from flexpert.ops.activations import ACTIVATIONS, get_activation
from flexpert.testing import assert_close

D, F = 5, 7
COUNTS = [3, 0, 4, 1]


def make_bank(kind=MLPExperts, seed=0, **options):
    torch.manual_seed(seed)
    bank = kind(**{"num_experts": 4, "model_dim": D, "hidden_dim": F, **options}).double()
    for bias in (bank.b1, bank.b2):
        if bias is not None:
            nn.init.normal_(bias)
    return bank


def linears(bank, e):
    """The expert as the modules whose parameters it is said to be laid out like: (gate, up or None, down)."""

    def linear(weight, bias):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
        module.weight = nn.Parameter(weight)
        if bias is not None:
            module.bias = nn.Parameter(bias)
        return module

    w1, b1 = bank.w1.detach()[e], None if bank.b1 is None else bank.b1.detach()[e]
    down = linear(bank.w2.detach()[e], None if bank.b2 is None else bank.b2.detach()[e])
    if isinstance(bank, GLUExperts):
        biases = (None, None) if b1 is None else b1
        return linear(w1[0], biases[0]), linear(w1[1], biases[1]), down
    return linear(w1, b1), None, down


def batch(counts=COUNTS, spare=0, dtype=torch.float64, **facts):
    rows = torch.randn(sum(counts) + spare, D, dtype=torch.float64).to(dtype).requires_grad_()
    return ExpertBatch(rows_ND=rows, counts_E=torch.tensor(counts), unit_N=None, **facts)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True, "b1", "b2"])
@pytest.mark.parametrize("kind", [MLPExperts, GLUExperts])
def test_each_expert_is_its_linears(kind, bias, activation):
    bank = make_bank(kind, bias=bias, activation=activation, output_dim=3)
    inputs = batch()
    y = bank(inputs)
    act = get_activation(activation).forward
    modules = [linears(bank, e) for e in range(4)]
    want = []
    for rows, (gate, up, down) in zip(inputs.rows_ND.split(COUNTS), modules, strict=True):
        hidden = act(gate(rows)) if up is None else act(gate(rows)) * up(rows)
        want.append(down(hidden))
    want = torch.cat(want)
    assert_close(y, want)

    grad = torch.randn_like(want)
    got = dict(
        zip(["x", "w1", "w2", "b1", "b2"], [inputs.rows_ND, bank.w1, bank.w2, bank.b1, bank.b2], strict=True)
    )
    got = {k: v for k, v in got.items() if v is not None}
    grads = dict(zip(got, torch.autograd.grad(y, got.values(), grad), strict=True))
    (x_grad,) = torch.autograd.grad(want, inputs.rows_ND, grad, retain_graph=True)
    assert_close(grads["x"], x_grad, name="x")
    want.backward(grad)
    for e, (gate, up, down) in enumerate(modules):
        parts = [gate] if up is None else [gate, up]
        shape = got["w1"].shape[1:]
        pairs = {
            "w1": torch.stack([true_grad(m.weight) for m in parts]).view(shape),
            "w2": true_grad(down.weight),
            "b1": None
            if gate.bias is None
            else torch.stack([true_grad(m.bias) for m in parts]).view(shape[:-1]),
            "b2": None if down.bias is None else true_grad(down.bias),
        }
        for name, value in pairs.items():
            assert (value is None) == (name not in grads)
            if value is not None:
                assert_close(grads[name][e], value, name=f"{name} of expert {e}")


def true_grad(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize("kind", [MLPExperts, GLUExperts])
@pytest.mark.parametrize("slots", [None, [2, -1, 0, 1], [1, 1, -1, 3]])
@pytest.mark.parametrize("spare", [0, 3])
def test_slots_and_fused(kind, slots, spare):
    """Experts of other banks give 0; the fused path is the composed one."""
    bank = make_bank(kind, bias=True)
    slot_E = None if slots is None else torch.tensor(slots)
    x = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    unit_N = torch.randint(6, (sum(COUNTS) + spare,))
    weight_N = torch.rand(len(unit_N), dtype=torch.float64, requires_grad=True)
    routing = Routing(unit_N=unit_N, weight_N=weight_N, counts_E=torch.tensor(COUNTS), num_units=6)
    fused = bank.fused(x, routing, slot_E)
    rows = bank(ExpertBatch(rows_ND=x[unit_N], counts_E=routing.counts_E, unit_N=unit_N, slot_E=slot_E))
    own = torch.repeat_interleave(torch.tensor(slots or range(4)), torch.tensor(COUNTS)) >= 0
    assert rows[: len(own)][~own].count_nonzero() == 0
    assert rows[len(own) :].count_nonzero() == 0
    want = torch.zeros(6, D, dtype=torch.float64).index_add(0, unit_N, rows * weight_N[:, None])
    assert_close(fused, want)
    leaves, grad = [x, weight_N, *bank.parameters()], torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(fused, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        assert_close(a, b)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert", ["mlp", "glu"])
def test_a_layer_that_recomputes_has_the_same_bits(expert, dtype, autocast):
    def run(**options):
        torch.manual_seed(0)
        spec = {"name": expert, **options}
        config = {"model_dim": 16, "hidden_dim": 24, "num_experts": 3, "top_k": 2, "expert_bias": True}
        layer, x, saved = MoE(MoEConfig(expert=spec, **config)).to(dtype), torch.randn(20, 16).to(dtype), []
        with (
            saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t),
            torch.autocast("cpu", autocast, enabled=autocast is not None),
        ):
            y = layer(x)
        wide = [shape for shape in saved if len(shape) == 2 and shape[0] >= 40]  # rows, not parameters
        return [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))], wide

    (want, kept), (got, nothing) = run(), run(recompute=True)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert len(kept) == 1
    assert kept[0][1] == (48 if expert == "glu" else 24)
    assert nothing == []


@pytest.mark.parametrize("kind", [MLPExperts, GLUExperts])
@pytest.mark.parametrize("slots", [None, [2, -1, 0, 1]])
def test_rows_of_a_bank_that_recomputes(kind, slots):
    bank, again = (make_bank(kind, bias=True, output_dim=3, recompute=flag) for flag in (False, True))
    inputs = batch(spare=2, slot_E=None if slots is None else torch.tensor(slots))
    saved, results = [], []
    with saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = again(inputs)
    assert not any(len(shape) == 2 and shape[0] >= len(y) and shape[1] >= F for shape in saved)
    for one, rows in ((bank, bank(inputs)), (again, y)):
        leaves = [inputs.rows_ND, *one.parameters()]
        results.append([rows, *torch.autograd.grad(rows.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


def test_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in make_bank(bias=True, output_dim=3).named_parameters()}
    assert shapes == {"w1": (4, F, D), "w2": (4, 3, F), "b1": (4, F), "b2": (4, 3)}
    shapes = {name: tuple(p.shape) for name, p in make_bank(GLUExperts, bias="b1").named_parameters()}
    assert shapes == {"w1": (4, 2, F, D), "w2": (4, D, F), "b1": (4, 2, F)}


# Initial weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MLPExperts, GLUExperts])
def test_an_expert_starts_the_same_in_a_bank_of_any_size(kind):
    small, large = (kind(num_experts=n, model_dim=D, hidden_dim=F) for n in seeded([3, 8]))
    assert torch.equal(small.w1, large.w1[:3])
    assert torch.equal(small.w2, large.w2[:3])
    assert len(large.w1.detach().flatten().unique()) == large.w1.numel()


def seeded(values):
    for value in values:
        torch.manual_seed(0)
        yield value


@pytest.mark.parametrize("num_experts", [1, 3, 64])
def test_construction_draws_once_from_the_global_generator(num_experts):
    torch.manual_seed(0)
    torch.randint(2**62, ())
    after = torch.get_rng_state()
    torch.manual_seed(0)
    MLPExperts(num_experts=num_experts, model_dim=D, hidden_dim=F)
    assert torch.equal(torch.get_rng_state(), after)


def test_two_banks_differ_and_a_seed_repeats_them():
    torch.manual_seed(0)
    one, two = (MLPExperts(num_experts=2, model_dim=D, hidden_dim=F) for _ in range(2))
    assert not torch.equal(one.w1, two.w1)
    torch.manual_seed(0)
    assert torch.equal(MLPExperts(num_experts=2, model_dim=D, hidden_dim=F).w1, one.w1)


def test_initial_scale():
    bank = MLPExperts(num_experts=4, model_dim=100, hidden_dim=50, bias=True)
    assert 0.099 < bank.w1.abs().max() <= 0.1  # 1 / sqrt(fan_in), as nn.Linear
    assert 0.14 < bank.w2.abs().max() <= 50**-0.5
    assert abs(bank.w1.std() * 3**0.5 - 0.1) < 0.002
    assert bank.b1.count_nonzero() == bank.b2.count_nonzero() == 0
    bank = MLPExperts(num_experts=4, model_dim=100, hidden_dim=50, init_std=0.005)
    assert bank.w1.abs().max() <= 0.01  # cut at two deviations, which leaves 0.88 of the deviation
    assert abs(bank.w1.std() / (0.8796 * 0.005) - 1) < 0.03


def test_reset_draws_anew():
    bank = make_bank(bias=True)
    before = bank.w1.clone()
    bank.reset_parameters()
    assert not torch.equal(before, bank.w1)
    assert bank.b1.count_nonzero() == 0


def test_meta_construction():
    with torch.device("meta"):
        bank = MLPExperts(num_experts=2, model_dim=D, hidden_dim=F, bias=True)
    assert all(p.is_meta for p in bank.parameters())
    bank.to_empty(device="cpu")
    bank.reset_parameters()
    assert bank.w1.isfinite().all()
    assert bank.b1.count_nonzero() == 0


def test_default_device_and_dtype_do_not_matter_to_the_draw():
    torch.manual_seed(0)
    want = MLPExperts(num_experts=2, model_dim=D, hidden_dim=F).w1
    torch.manual_seed(0)
    with torch.device("cpu"):
        assert torch.equal(MLPExperts(num_experts=2, model_dim=D, hidden_dim=F).w1, want)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        wide = MLPExperts(num_experts=2, model_dim=D, hidden_dim=F).w1
    finally:
        torch.set_default_dtype(torch.float32)
    assert wide.dtype == torch.float64
    assert torch.equal(wide.float(), want)


def test_counts_of_parameters_and_operations():
    bank = make_bank(GLUExperts, bias=True, output_dim=3)
    assert sum(bank.params_of_experts()) == sum(p.numel() for p in bank.parameters())
    assert bank.params_of_experts() == [2 * F * D + 3 * F + 2 * F + 3] * 4
    assert bank.flops_of_experts() == [2 * (2 * F * D + 3 * F)] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts=0: expected an integer >= 1"),
        ({"hidden_dim": 0}, "hidden_dim=0: expected an integer >= 1"),
        ({"model_dim": 2.0}, "model_dim=2.0: expected an integer >= 1"),
        ({"output_dim": 0}, "output_dim=0: expected an integer >= 1"),
        ({"bias": "b3"}, "bias='b3': expected False, True, 'b1' or 'b2'"),
        ({"init_std": 0}, "init_std=0: expected a finite number > 0"),
        ({"init_std": float("nan")}, "init_std=nan: expected a finite number > 0"),
        ({"recompute": 1}, "recompute=1: expected True or False"),
        ({"activation": "gleu"}, "activation='gleu' is unknown; choose one of: .*gelu"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_bank(**options)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("expert", ["mlp", "glu"])
def test_autocast_computes_in_its_dtype(expert, autocast):
    torch.manual_seed(0)
    layer = MoE(MoEConfig(model_dim=16, hidden_dim=32, num_experts=3, expert=expert, expert_bias=True))
    x = torch.randn(20, 16)
    low = copy.deepcopy(layer)
    low.experts.to(autocast)
    for fused in (True, False):
        layer.transport.fused = low.transport.fused = fused
        with torch.autocast("cpu", dtype=autocast):
            y = layer(x)
        assert y.dtype == torch.float32
        assert not torch.equal(y, layer(x))
        assert_close(y, layer(x), 2e-2)
