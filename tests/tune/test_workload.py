"""Shapes and workloads: sizes against real layers, round trips, errors that name the field."""

from __future__ import annotations

import pytest
import torch

from flexpert import MoE, MoEConfig
from flexpert.core.errors import ConfigError, InputError
from flexpert.experts import ModuleExperts
from flexpert.tune import LayerShape, Workload
from tests.tune.cases import shape_of


class Mesh:
    expert_ranks, slices, replicas, ranks_per_node = 2, 2, 1, 2


@pytest.mark.parametrize("expert", ["mlp", "glu"])
@pytest.mark.parametrize("bias", [False, True, "b1", "b2"])
def test_sizes_are_those_of_the_layer(expert, bias):
    config = MoEConfig(model_dim=6, hidden_dim=8, num_experts=4, expert=expert, expert_bias=bias)
    bank = MoE(config).experts
    shape = LayerShape.of(Mesh, bank)
    assert shape.params_per_expert == bank.params_of_experts()[0]
    assert shape.flops_per_row == bank.flops_of_experts()[0]
    # Two expert ranks of two slices: each holds two experts, half of what is cut.
    cut = sum(p.numel() for name, p in bank.named_parameters() if name != "b2") // 4
    whole = bank.b2.numel() // 2 if bank.b2 is not None else 0
    assert sum(part.numel for part in shape.parts) == cut + whole
    assert LayerShape.from_dict(shape.to_dict()) == shape


def test_a_bank_of_other_experts_has_no_shape():
    bank = ModuleExperts([torch.nn.Linear(4, 4) for _ in range(4)], model_dim=4)
    with pytest.raises(ConfigError, match="ModuleExperts is no bank of equal experts"):
        LayerShape.of(Mesh, bank)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_dim": 0}, "model_dim=0"),
        ({"ranks_per_node": 1.5}, "ranks_per_node=1.5"),
        ({"gated": 1}, "gated=1"),
        ({"bias": "b3"}, "bias='b3'"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"expert_ranks": 3}, "expert_ranks=3"),
        ({"slices": 3}, "slices=3"),
        ({"colour": 1}, "'colour'"),
    ],
)
def test_errors_name_the_field(change, named):
    with pytest.raises(ConfigError) as error:
        LayerShape.from_dict(shape_of().to_dict() | change)
    assert named in str(error.value)


def test_a_missing_field():
    data = shape_of().to_dict()
    del data["hidden_dim"]
    with pytest.raises(ConfigError, match="hidden_dim is missing"):
        LayerShape.from_dict(data)


def test_uniform_and_zipf():
    shape = shape_of(num_experts=8)
    assert Workload.uniform(shape, 19).rows_PE.tolist() == [[3, 3, 3, 2, 2, 2, 2, 2]] * 4
    even, skewed = (Workload.zipf(shape, 4000, skew=skew, seed=1).rows_PE for skew in (0.0, 1.5))
    assert even.sum(1).tolist() == skewed.sum(1).tolist() == [4000] * 4
    assert even.max() < 600 < skewed.max()
    share = skewed.sum(0).sort(descending=True).values.double() / 16000
    expected = torch.arange(1, 9, dtype=torch.float64) ** -1.5
    assert torch.allclose(share, expected / expected.sum(), atol=0.02)
    again = Workload.zipf(shape, 4000, skew=1.5, seed=1).rows_PE
    assert torch.equal(skewed, again)
    assert Workload.zipf(shape, 4000, skew=1.5, seed=1, capacity=700).rows_PE.max() == 700


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows_PE": torch.ones(4, 4)}, "rows_PE is torch.float32"),
        ({"rows_PE": torch.ones(4, dtype=torch.int64)}, "of shape (4,)"),
        ({"tokens": -1}, "tokens=-1"),
        ({"capacity": 1.5}, "capacity=1.5"),
    ],
)
def test_bad_workloads(change, named):
    good = {"rows_PE": torch.ones(4, 4, dtype=torch.int64), "tokens": 4}
    with pytest.raises(InputError) as error:
        Workload(**good | change)
    assert named in str(error.value)


def test_a_workload_of_another_layer():
    with pytest.raises(InputError, match="rows_PE has shape"):
        Workload.uniform(shape_of(num_experts=8), 16).check(shape_of())
    with pytest.raises(InputError, match="skew=-1"):
        Workload.zipf(shape_of(), 16, skew=-1)
