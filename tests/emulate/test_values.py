from __future__ import annotations

import math

import pytest
import torch

from flexpert.core.errors import InputError
from flexpert.emulate.values import decode, encode


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -7, 1.5, math.inf, "ü\n", [], (), {}, [1, [2, (3, None)]],
        {"a": 1, 2: (3.0,), (1, "x"): {"tuple": [1]}}, {"map": 1}, {"tensor": "0"},
    ],
)  # fmt: skip
def test_a_value_comes_back_as_it_was(value: object) -> None:
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_come_back(dtype: torch.dtype) -> None:
    x = torch.arange(6).view(2, 3).to(dtype)
    value = {"x": x, "more": [x.t(), torch.tensor(1.5), torch.empty(0, 3)], "same": (x, x)}
    back = decode(encode(value))
    assert back["x"].dtype == dtype
    assert torch.equal(back["x"], x)
    assert torch.equal(back["more"][0], x.t())
    assert back["more"][1].item() == 1.5
    assert back["more"][2].shape == (0, 3)
    assert torch.equal(back["same"][1], x)


def test_a_gradient_stays_behind() -> None:
    back = decode(encode(torch.ones(2, requires_grad=True) * 2))
    assert torch.equal(back, torch.full((2,), 2.0))


@pytest.mark.parametrize("value", [object(), {1}, b"bytes", [1, 2j], {"f": len}])
def test_other_types_are_refused_by_name(value: object) -> None:
    with pytest.raises(InputError, match="a rank returned a (object|set|bytes|complex|builtin_function)"):
        encode(value)
