"""The fused grouped MLP in plain PyTorch: one pass over the experts, keeping only the pre-activation.

Weights of rows never scale a hidden tensor: they enter where rows are gathered or summed, in fp32. Rows of a
segment are computed in padded numbers (see `products`); what follows a segment is zeroed where it would enter
a sum over rows, and overwritten by the next segment where it is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .activations import Activation, get_activation
from .bags import RowSource, sum_rows, wide
from .memory import empty
from .products import outer_product, padded, row_product, segments, slack, turning_pays


def _kept(counts_E: Tensor, slot_E: Tensor | None) -> Tensor | None:
    """The rows of experts that are here; None for all of them."""
    if slot_E is None:
        return None
    return (slot_E >= 0).repeat_interleave(counts_E).nonzero()[:, 0]


def hidden_forward(act: Activation, pre: Tensor, gated: bool) -> Tensor:
    """act(pre), or act(gate) * up for a pre-activation of (n, 2F)."""
    if not gated:
        return act.forward(pre)
    gate, up = pre.chunk(2, dim=1)
    return act.forward(gate).mul_(up)


def hidden_backward(act: Activation, grad: Tensor, pre: Tensor, gated: bool) -> Tensor:
    """The gradient of `pre` from that of its hidden_forward."""
    if not gated:
        return act.backward(grad, pre)
    gate, up = pre.chunk(2, dim=1)
    d_pre = torch.empty_like(pre)
    d_gate, d_up = d_pre.chunk(2, dim=1)
    torch.mul(grad, act.forward(gate), out=d_up)
    d_gate.copy_(act.backward(grad * up, gate))
    return d_pre


def _combine(
    rows_N: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    slot_E: Tensor | None,
    units: int,
) -> Tensor:
    total = int(counts_E.sum())
    weight_N = None if weight_N is None else weight_N[:total]
    return sum_rows(rows_N, unit_N[:total], weight_N, _kept(counts_E, slot_E), units)


def grouped_mlp(
    x_TD: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    slot_E: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(y_TO, pre): pre is the pre-activation, (N + slack, F or 2F), empty without `save`."""
    act, gated, spare = get_activation(activation), w1.dim() == 4, slack(x_TD.dtype)
    w1, b1 = w1.flatten(1, -2), None if b1 is None else b1.flatten(1)
    source = RowSource(x_TD, unit_N)
    pre_N = empty(x_TD, (len(unit_N) + spare if save else 0, w1.shape[1]))
    y_NO = empty(x_TD, (len(unit_N) + spare, w2.shape[1]))
    for slot, start, stop in segments(counts_E, slot_E):
        end = start + padded(stop - start, x_TD.dtype)
        turned = not save and turning_pays(end - start, w1[slot], w2[slot])
        x, y = source.take(start, stop, end - start), y_NO[start:end]
        bias1, bias2 = None if b1 is None else b1[slot], None if b2 is None else b2[slot]
        pre = row_product(x, w1[slot].t(), bias1, pre_N[start:end] if save else None, turned=turned)
        row_product(hidden_forward(act, pre, gated), w2[slot].t(), bias2, y, turned=turned)
    if save:  # rows that nothing wrote
        pre_N[int(counts_E.sum()) :] = 0
        if slot_E is not None:
            pre_N[(slot_E < 0).repeat_interleave(counts_E).nonzero()[:, 0]] = 0
    return _combine(y_NO, unit_N, weight_N, counts_E, slot_E, len(x_TD)), pre_N


@dataclass(kw_only=True)
class _Gradients:
    """The gradients that are asked for (others are None), filled one expert at a time."""

    act: Activation
    gated: bool
    weight_N: Tensor | None
    w1: Tensor
    w2: Tensor
    b2: Tensor | None
    x: RowSource
    grad: RowSource
    weighted_grad: RowSource
    d_rows: Tensor | None
    d_weight: Tensor | None
    d_w1: Tensor | None
    d_b1: Tensor | None
    d_w2: Tensor | None
    d_b2: Tensor | None
    seen: set[int] = field(default_factory=set)

    def add(self, slot: int, start: int, stop: int, pre: Tensor) -> None:
        """One expert's part; `pre` has its padded number of rows."""
        count, size, again = stop - start, len(pre), slot in self.seen
        self.seen.add(slot)
        dy = self.grad.take(start, stop, size)
        d_hidden = row_product(dy, self.w2[slot])
        if self.d_weight is not None or self.d_w2 is not None:
            hidden = hidden_forward(self.act, pre, self.gated)
            hidden[count:] = 0
        if self.d_weight is not None:
            acc = self.d_weight.dtype
            d_weight = (d_hidden[:count] * hidden[:count]).sum(1, dtype=acc)
            if self.b2 is not None:
                d_weight += torch.mv(dy[:count], self.b2[slot])
            self.d_weight[start:stop] = d_weight
        if self.weight_N is not None and (self.d_w2 is not None or self.d_b2 is not None):
            dy = self.weighted_grad.take(start, stop, size)
        if self.d_w2 is not None:
            outer_product(dy, hidden, self.d_w2[slot], accumulate=again)
        if self.d_b2 is not None:
            self.d_b2[slot] += dy.sum(0)
        if self.d_rows is not None or self.d_w1 is not None or self.d_b1 is not None:
            d_pre = hidden_backward(self.act, d_hidden, pre, self.gated)
            self._add_first(slot, start, stop, d_pre, again)

    def _add_first(self, slot: int, start: int, stop: int, d_pre: Tensor, again: bool) -> None:
        """From the gradient of the pre-activation, without the rows' weights, to the first layer's."""
        count, size = stop - start, len(d_pre)
        d_pre[count:] = 0
        if self.d_rows is not None:
            row_product(d_pre, self.w1[slot], out=self.d_rows[start : start + size])
        if self.d_w1 is not None:
            outer_product(d_pre, self.x.take(start, stop, size), self.d_w1[slot], accumulate=again)
        if self.d_b1 is not None:
            weight = None if self.weight_N is None else self.weight_N[start:stop]
            one = torch.zeros(count, dtype=torch.int64, device=d_pre.device)
            self.d_b1[slot] += sum_rows(d_pre, one, weight, None, 1)[0]

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
        d_rows=empty(x_TD, (len(unit_N) + slack(x_TD.dtype), x_TD.shape[1])) if need_x else None,
        d_weight=torch.zeros(len(unit_N), dtype=acc, device=x_TD.device) if need_weight else None,
        d_w1=empty(w1, flat.shape) if need_w1 else None,
        d_b1=w1.new_zeros(flat.shape[:2]) if need_b1 else None,
        d_w2=empty(w2, w2.shape) if need_w2 else None,
        d_b2=w2.new_zeros(w2.shape[:2]) if need_b2 else None,
    )
    for slot, start, stop in segments(counts_E, slot_E):
        gradients.add(slot, start, stop, pre_N[start : start + padded(stop - start, x_TD.dtype)])
    gradients.clear_unseen()
    d_x = None
    if gradients.d_rows is not None:
        d_x = _combine(gradients.d_rows, unit_N, weight_N, counts_E, slot_E, len(x_TD))
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


KERNELS = {"grouped_mlp": grouped_mlp, "grouped_mlp_backward": grouped_mlp_backward}
