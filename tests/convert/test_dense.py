"""Values of a dense MLP: cut, joined, averaged, read and written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from flexpert import CheckpointError
from flexpert.convert.dense import (
    DenseMLP,
    average,
    is_linear,
    join,
    linear_shape,
    read_linear,
    stack,
    write_linear,
)


def make(gated=False, bias=True, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden = (2, 6) if gated else (6,)
    b1, b2 = (draw(*hidden), draw(3)) if bias else (None, None)
    return DenseMLP(w1=draw(*hidden, 4), b1=b1, w2=draw(3, 6), b2=b2, activation="silu")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_formula_sizes_and_cuts(gated, bias):
    mlp, x = make(gated, bias), torch.randn(5, 4, dtype=torch.float64)
    if gated:
        gate, up = (
            x @ w.T + (0 if b is None else b)
            for w, b in zip(mlp.w1, mlp.b1 if bias else [None] * 2, strict=True)
        )
        hidden = F.silu(gate) * up
    else:
        hidden = F.silu(x @ mlp.w1.T + (mlp.b1 if bias else 0))
    want = hidden @ mlp.w2.T + (mlp.b2 if bias else 0)
    torch.testing.assert_close(mlp(x), want)
    assert (mlp.gated, mlp.model_dim, mlp.hidden_dim, mlp.output_dim) == (gated, 4, 6, 3)
    assert mlp.num_params() == sum(t.numel() for t in mlp.tensors().values())
    assert mlp.flops() == 2 * (24 * (2 if gated else 1) + 18)
    parts = [
        mlp.neurons(index, bias_share=1 / 2) for index in (torch.tensor([5, 0, 2]), torch.tensor([1, 3, 4]))
    ]
    torch.testing.assert_close(parts[0](x) + parts[1](x), want)
    torch.testing.assert_close(join(parts)(x), want)


@pytest.mark.parametrize(("b1", "b2", "kind"), [(1, 1, True), (1, 0, "b1"), (0, 1, "b2"), (0, 0, False)])
def test_expert_bias(b1, b2, kind):
    mlp = make()
    mlp = DenseMLP(
        w1=mlp.w1, b1=mlp.b1 if b1 else None, w2=mlp.w2, b2=mlp.b2 if b2 else None, activation="silu"
    )
    assert mlp.expert_bias == kind
    assert set(stack([mlp, mlp])) == {"w1", "w2", *(["b1"] if b1 else []), *(["b2"] if b2 else [])}


def test_average():
    parts = [make(seed=seed) for seed in range(3)]
    shares = [0.5, 0.25, 0.25]
    got = average(parts, shares)
    for name, tensor in got.tensors().items():
        want = sum(s * p.tensors()[name] for s, p in zip(shares, parts, strict=True))
        torch.testing.assert_close(tensor, want)


def test_the_mean_of_equal_ones_has_their_bits():
    mlp = make(dtype=torch.float32)
    for name, tensor in average([mlp] * 7, [1 / 7] * 7).tensors().items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, mlp.tensors()[name])


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_linear_modules(kind):
    module = nn.Linear(3, 5) if kind is nn.Linear else Conv1D(5, 3)
    assert is_linear(module)
    assert linear_shape(module) == (3, 5)
    weight, bias = read_linear(module)
    x = torch.randn(2, 3)
    torch.testing.assert_close(F.linear(x, weight, bias), module(x).detach())
    other = nn.Linear(3, 5)
    write_linear(module, *read_linear(other), "it")
    torch.testing.assert_close(module(x), other(x))
    with pytest.raises(
        CheckpointError, match=r"it of the dense model has a weight .* and a bias, the experts make"
    ):
        write_linear(module, torch.zeros(4, 3), torch.zeros(4), "it")
    with pytest.raises(CheckpointError, match="and no bias; give the dense model that was converted"):
        write_linear(module, weight, None, "it")


def test_other_modules_are_not_linear():
    assert not is_linear(nn.Bilinear(2, 2, 2))
    assert not is_linear(type("Quantised", (nn.Linear,), {})(2, 2))
