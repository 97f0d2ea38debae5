"""The checks that other tests rest on: they must fail where they should."""

from __future__ import annotations

import pytest
import torch

from flexpert.testing import assert_close, relative_error


def test_relative_error():
    want = torch.tensor([3.0, 4.0])
    assert relative_error(want, want) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, 4.5]), want, scale=50.0) == pytest.approx(0.01)
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == pytest.approx(5)
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


@pytest.mark.parametrize("bad", [1.001, float("nan"), float("inf")])
def test_assert_close_fails_with_the_error(bad):
    assert_close(torch.tensor([1.0]), torch.tensor([1.0 + 1e-7]))
    with pytest.raises(AssertionError, match="weights: relative error .*, allowed 3e-06"):
        assert_close(torch.tensor([bad]), torch.tensor([1.0]), name="weights")
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0]), torch.tensor([bad]))


def test_assert_close_compares_shapes():
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(1, 2\)"):
        assert_close(torch.ones(2), torch.ones(1, 2))


def test_tolerance_is_that_of_the_result():
    want = torch.tensor([1.0], dtype=torch.float64)
    assert_close(want.bfloat16() * 1.01, want)
    with pytest.raises(AssertionError):
        assert_close(want * (1 + 1e-9), want)
