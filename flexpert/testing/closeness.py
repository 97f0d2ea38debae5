"""Closeness by relative error."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def relative_error(got: Tensor, want: Tensor, scale: float = 0.0) -> float:
    """|got - want| / max(|want|, scale) in the Frobenius norm, computed in fp64; |got| where that is 0.

    Raises:
        AssertionError: the shapes differ.
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    scale = max(float(want.norm()), scale)
    return float((got - want).norm()) / (scale if scale > 0 else 1.0)


def assert_close(
    got: Tensor, want: Tensor, tolerance: float | None = None, *, scale: float = 0.0, name: str = "value"
) -> None:
    """Check that `got` is `want` up to a relative error, which NaN and infinity never are.

    Args:
        got: the result, of any dtype.
        want: the truth, better of higher precision.
        tolerance: largest relative error; None for that of got's dtype in `TOLERANCES`.
        scale: the least norm that errors are relative to, for truths that are 0 up to rounding.
        name: of the value, for the message.

    Raises:
        AssertionError: it is not; the message has the error and the tolerance.
    """
    tolerance = TOLERANCES[got.dtype] if tolerance is None else tolerance
    error = relative_error(got, want, scale)
    assert error <= tolerance, f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"
