"""How far rounding may take the grouped MLP from the truth, per element: an analysis that runs in float64.

A sum of n products in fp32 errs by at most n u times the sum of their sizes, u half the spacing of fp32 at
one; a value that is narrowed errs by its dtype's u more; an error e of a pre-activation spreads to act(pre
+- e). Nothing is relative to a result, which may cancel. What is narrowed in bf16: the pre-activation, the
hidden row, an expert's result for a row and its gradient for one, the gradient of the pre-activation, the
weighted hidden row, and results: gradients of weights once per expert that adds to them. There activations
and slopes are only as good as ROUGH, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.ops import ACTIVATIONS

SUM = torch.finfo(torch.float32).eps / 2
EXTRA = 4  # roundings of a sum besides its products: bias, weight, partial sums
TINY = 1e-30  # results below are taken for zero by bf16 units
ACTIVATION = (
    16 * SUM
)  # of an activation, relative to (1 + pre^2), which bounds value, slope and their conditions
# In bf16, relative to the terms of an activation or slope: 7e-5 of the fit of the tail, 8e-5 of the power of
# two and twice the 6e-5 of the reciprocal.
ROUGH = 3e-4


@dataclass(frozen=True)
class Value:
    """A tensor and the largest error of each of its elements."""

    v: Tensor
    e: Tensor

    def __mul__(self, other: Value) -> Value:
        error = self.v.abs() * other.e + self.e * other.v.abs() + self.e * other.e
        return Value(self.v * other.v, error + SUM * (self.v * other.v).abs())

    def __getitem__(self, item: object) -> Value:
        return Value(self.v[item], self.e[item])

    def through(self, function: Callable[[Tensor], Tensor], rough: float, size: float = 0) -> Value:
        """`function` of it, whose terms are no larger than the result plus `size`."""
        middle = function(self.v)
        spread = [(function(self.v + side * self.e) - middle).abs() for side in (-1, 1)]
        error = ACTIVATION * (1 + self.v.square()) + rough * (middle.abs() + size)
        return Value(middle, torch.maximum(*spread) + error)

    def narrowed(self, u: float, times: int | Tensor = 1) -> Value:
        return Value(self.v, self.e + u * times * (self.v.abs() + self.e))


def exact(value: Tensor) -> Value:
    return Value(value, torch.zeros_like(value))


def product(a: Value, b: Value, plus: Tensor | None = None) -> Value:
    """a @ b.T + plus."""
    size = a.v.abs() @ b.v.abs().T
    error = a.v.abs() @ b.e.T + a.e @ (b.v.abs() + b.e).T
    value = a.v @ b.v.T
    if plus is not None:
        size, value = size + plus.abs(), value + plus
    return Value(value, error + (a.v.shape[1] + EXTRA) * SUM * (size + error) + TINY)


class Total:
    """Of a result: its value, error, the sum of its terms' sizes, their number, that of experts."""

    def __init__(self, shape: torch.Size) -> None:
        self.value, self.error, self.size, self.terms, self.experts = torch.zeros(
            5, *shape, dtype=torch.float64
        ).unbind()


class Bounds:
    """`y`, and for each leaf of a case its gradient: the analysis of one call whose y has the gradient dy."""

    def __init__(self, case, dy: Tensor) -> None:
        self.u = torch.finfo(case.x_TD.dtype).eps / 2
        wide = {name: leaf.detach().double() for name, leaf in case.leaves.items()}
        self.case, self.wide, self.dy = case, wide, dy.double()
        shapes = {"y": dy.shape, **{name: leaf.shape for name, leaf in wide.items()}}
        self.totals = {name: Total(shape) for name, shape in shapes.items()}
        start = 0
        for expert, count in enumerate(case.counts_E.tolist()):
            slot = expert if case.slot_E is None else int(case.slot_E[expert])
            if slot >= 0 and count:
                self._expert(slot, slice(start, start + count))
            start += count

    def largest_error(self, name: str) -> Tensor:
        """The largest error of each element of `y` or of a leaf's gradient."""
        total, u = self.totals[name], SUM if name == "weight_N" else self.u
        error = total.error + (total.terms + EXTRA) * SUM * (total.size + total.error)
        # Gradients of weights are stored once per expert of their slot, the first times as partial sums.
        again = (total.experts - 1).clamp(min=0) if name[0] in "wb" else 0
        return error + u * (total.value.abs() + error) + again * u * (total.size + error) + TINY

    def _add(self, name: str, at: object, part: Value, size: Tensor, terms: int) -> None:
        """`part` goes to a result; it is a sum of so many terms, of this size if none cancel."""
        count, one = torch.full_like(size, terms), torch.ones_like(size)
        for total, more in zip(
            vars(self.totals[name]).values(), (part.v, part.e, size, count, one), strict=True
        ):
            if isinstance(at, Tensor):
                total.index_add_(0, at, more)
            else:
                total[at] += more

    def _outer(self, name: str, at: object, left: Value, right: Value) -> None:
        """The sum over rows of left[row] x right[row]."""
        part = product(Value(left.v.T, left.e.T), Value(right.v.T, right.e.T))
        self._add(name, at, part, left.v.abs().T @ right.v.abs(), len(left.v))

    def _expert(self, slot: int, rows: slice) -> None:
        case, wide, unit = self.case, self.wide, self.case.unit_N[rows]
        act = ACTIVATIONS[case.activation]
        gated, has_weight = case.w1.dim() == 4, case.weight_N is not None
        x, dy = exact(wide["x_TD"][unit]), exact(self.dy[unit])
        weight = exact(wide["weight_N"][rows] if has_weight else torch.ones(len(unit), dtype=torch.float64))
        weight = weight[:, None]
        w2, b2 = wide["w2"][slot], None if case.b2 is None else wide["b2"][slot]

        pre = []
        for half in (0, 1) if gated else (...,):
            bias = None if case.b1 is None else wide["b1"][slot][half]
            pre.append(product(x, exact(wide["w1"][slot][half]), bias).narrowed(self.u))
        rough = ROUGH if self.u > SUM else 0.0
        value = pre[0].through(act.forward, rough)
        slope = pre[0].through(lambda at: act.backward(torch.ones_like(at), at), rough, size=1.5)
        hidden = value * pre[1] if gated else value
        y = product(hidden.narrowed(self.u), exact(w2), b2).narrowed(self.u)
        y = y * weight
        self._add("y", unit, y, y.v.abs(), 1)

        g = product(dy, exact(w2.T))
        if has_weight:
            parts = g * hidden.narrowed(self.u)
            part, size, terms = parts.v.sum(1), parts.v.abs().sum(1), w2.numel() // len(w2)
            if b2 is not None:
                part, size, terms = part + dy.v @ b2, size + dy.v.abs() @ b2.abs(), terms + len(w2)
            self._add("weight_N", rows, Value(part, parts.e.sum(1)), size, terms)
        self._outer("w2", slot, dy, (hidden * weight).narrowed(self.u))
        if b2 is not None:
            self._sum("b2", slot, dy * weight)
        d_value = g * pre[1] if gated else g
        d_pre = [(d_value * slope * weight).narrowed(self.u)]
        if gated:
            d_pre.append((g * value * weight).narrowed(self.u))
        for half, part in enumerate(d_pre):
            at = (slot, half) if gated else slot
            w1 = wide["w1"][at]
            d_x = product(part, exact(w1.T))  # both halves are summed before the row is narrowed
            self._add("x_TD", unit, d_x.narrowed(self.u), part.v.abs() @ w1.abs(), 1)
            self._outer("w1", at, part, x)
            if case.b1 is not None:
                self._sum("b1", at, part)

    def _sum(self, name: str, at: object, rows: Value) -> None:
        self._add(name, at, Value(rows.v.sum(0), rows.e.sum(0)), rows.v.abs().sum(0), len(rows.v))
