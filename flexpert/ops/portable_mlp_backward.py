"""The backward pass of the fused grouped MLP in plain PyTorch; see `portable_mlp`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .activations import Activation, get_activation, hidden_backward, hidden_forward
from .bags import RowSource, sum_here, sum_runs, wide
from .memory import empty
from .products import outer_product, row_product, slack
from .waves import Wave, room, waves


@dataclass(kw_only=True)
class _Gradients:
    """The gradients that are asked for (others are None), filled one wave at a time."""

    act: Activation
    gated: bool
    weight_N: Tensor | None
    w1: Tensor
    w2: Tensor
    b2: Tensor | None
    x: RowSource
    grad: RowSource
    weighted_grad: RowSource
    hidden: Tensor
    d_hidden: Tensor
    d_pre: Tensor
    d_rows: Tensor | None
    d_weight: Tensor | None
    d_w1: Tensor | None
    d_b1: Tensor | None
    d_w2: Tensor | None
    d_b2: Tensor | None
    seen: set[int] = field(default_factory=set)

    def add(self, wave: Wave, pre: Tensor) -> None:
        """One wave's part; `pre` has its `size` rows."""
        dy = self.grad.take(wave.start, wave.stop, wave.size)
        hidden, d_hidden = self.hidden[: wave.size], self.d_hidden[: wave.size]
        need_first = self.d_rows is not None or self.d_w1 is not None or self.d_b1 is not None
        if self.d_b2 is not None:
            self._add_bias(wave, dy, self.d_b2)
        if self.d_weight is not None or self.d_w2 is not None:
            hidden_forward(self.act, pre, self.gated, out=hidden)
        if self.d_weight is not None or need_first:
            for part in wave.parts:
                row_product(dy[part.rows], self.w2[part.slot], out=d_hidden[part.rows])
        if self.d_weight is not None:
            self._set_weight(wave, dy, hidden, d_hidden, self.d_weight[wave.start : wave.stop])
        if need_first:
            self._add_first(wave, pre, d_hidden)
        if self.d_w2 is not None:
            if self.weight_N is not None:
                dy = self.weighted_grad.take(wave.start, wave.stop, wave.size)
            self._add_outer(wave, dy, hidden, self.d_w2)
        self.seen.update(part.slot for part in wave.parts)

    def _set_weight(self, wave: Wave, dy: Tensor, hidden: Tensor, d_hidden: Tensor, d_weight: Tensor) -> None:
        """The product of a row's gradient with the row before it was weighted."""
        count = wave.stop - wave.start
        product = self.d_pre[:count, : hidden.shape[1]]  # nothing else is in this buffer yet
        torch.mul(d_hidden[:count], hidden[:count], out=product)
        torch.sum(product, 1, dtype=d_weight.dtype, out=d_weight)
        if self.b2 is not None:
            for part in wave.parts:
                d_weight[part.own] += torch.mv(dy[part.own], self.b2[part.slot])

    def _add_first(self, wave: Wave, pre: Tensor, d_hidden: Tensor) -> None:
        """From the gradient of the hidden rows, without the rows' weights, to the first layer's."""
        d_pre = hidden_backward(self.act, d_hidden, pre, self.gated, out=self.d_pre[: wave.size])
        if self.d_rows is not None:
            d_rows = self.d_rows[wave.start :]
            for part in wave.parts:
                row_product(d_pre[part.rows], self.w1[part.slot], out=d_rows[part.rows])
        if self.d_b1 is not None:
            self._add_bias(wave, d_pre, self.d_b1)
        if self.d_w1 is not None:
            self._add_outer(wave, d_pre, self.x.take(wave.start, wave.stop, wave.size), self.d_w1)

    def _add_bias(self, wave: Wave, rows: Tensor, total: Tensor) -> None:
        """The weighted sum of the rows of each part, added to its slot."""
        weight = None if self.weight_N is None else self.weight_N[wave.start : wave.stop]
        sums = sum_runs(rows, weight, wave.edges(rows.device))
        total.index_add_(0, wave.slots(rows.device), sums)

    def _add_outer(self, wave: Wave, a: Tensor, b: Tensor, total: Tensor) -> None:
        """a^T @ b of each part, added to its slot. Zeroes rows of both."""
        seen = set(self.seen)
        for part in reversed(wave.parts):
            if part.spare.start < part.spare.stop:
                a[part.spare].zero_()
                b[part.spare].zero_()
            outer_product(a[part.rows], b[part.rows], total[part.slot], accumulate=part.slot in seen)
            seen.add(part.slot)

    def clear_unseen(self) -> None:
        """Zeros for the weights of experts without rows."""
        for slot in set(range(len(self.w1))) - self.seen:
            for gradient in (self.d_w1, self.d_w2):
                if gradient is not None:
                    gradient[slot] = 0


def grouped_mlp_backward(
    grad_TO: Tensor,
    pre_N: Tensor,
    x_TD: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    slot_E: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of (x, weight, w1, b1, w2, b2); an empty tensor for those not asked for."""
    flat = w1.flatten(1, -2)
    need_x, need_weight, need_w1, need_b1, need_w2, need_b2 = needs
    acc = wide(x_TD.dtype) if weight_N is None else weight_N.dtype
    plan = list(waves(counts_E, slot_E, x_TD.dtype))
    rows = room(plan)
    gradients = _Gradients(
        act=get_activation(activation),
        gated=w1.dim() == 4,
        weight_N=weight_N,
        w1=flat,
        w2=w2,
        b2=b2,
        x=RowSource(x_TD, unit_N, weight_N),
        grad=RowSource(grad_TO, unit_N),
        weighted_grad=RowSource(grad_TO, unit_N, weight_N),
        hidden=empty(x_TD, (rows, w2.shape[2])),
        d_hidden=empty(x_TD, (rows, w2.shape[2])),
        d_pre=empty(x_TD, (rows, flat.shape[1])),
        d_rows=empty(x_TD, (len(unit_N) + slack(x_TD.dtype), x_TD.shape[1])) if need_x else None,
        d_weight=torch.zeros(len(unit_N), dtype=acc, device=x_TD.device) if need_weight else None,
        d_w1=empty(w1, flat.shape) if need_w1 else None,
        d_b1=w1.new_zeros(flat.shape[:2]) if need_b1 else None,
        d_w2=empty(w2, w2.shape) if need_w2 else None,
        d_b2=w2.new_zeros(w2.shape[:2]) if need_b2 else None,
    )
    for wave in plan:
        gradients.add(wave, pre_N[wave.start : wave.start + wave.size])
    gradients.clear_unseen()
    d_x = None
    if gradients.d_rows is not None:
        d_x = sum_here(gradients.d_rows, unit_N, weight_N, counts_E, slot_E, len(x_TD))
    d_w1, d_b1 = gradients.d_w1, gradients.d_b1
    found = (
        d_x,
        gradients.d_weight,
        None if d_w1 is None else d_w1.view(w1.shape),
        None if d_b1 is None else d_b1.view(w1.shape[:-1]),
        gradients.d_w2,
        gradients.d_b2,
    )
    nothing = (x_TD.new_empty(0), x_TD.new_empty(0, dtype=acc), *[x_TD.new_empty(0)] * 4)
    return tuple(none if some is None else some for some, none in zip(found, nothing, strict=True))
