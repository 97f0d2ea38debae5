"""Least squares among numbers that cannot be negative."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def nonnegative(equations: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """The x >= 0 for which equations @ x is nearest to values; of several, one.

    One unknown after the other is set to its best value, which for squares ends in the least of all.

    Args:
        equations: a row of factors for each value.
        values: what they should add up to.
    """
    matrix = torch.tensor(equations, dtype=torch.float64)
    target = torch.tensor(values, dtype=torch.float64)
    scale = matrix.norm(dim=0)
    used = [i for i, s in enumerate(scale.tolist()) if s > 0]
    matrix = matrix[:, used] / scale[used]
    gram, aim = (matrix.T @ matrix).tolist(), (matrix.T @ target).tolist()
    found = [0.0] * len(used)
    for _ in range(20_000):
        change = 0.0
        for i, row in enumerate(gram):
            better = max(0.0, found[i] + aim[i] - sum(a * b for a, b in zip(row, found, strict=True)))
            change = max(change, abs(better - found[i]))
            found[i] = better
        if change <= 1e-13 * max(found, default=0.0):
            break
    result = [0.0] * len(scale)
    for i, value in zip(used, found, strict=True):
        result[i] = value / float(scale[i])
    return result
