"""The fused grouped MLP in plain PyTorch: one pass over the experts, keeping only the pre-activation."""

from __future__ import annotations

from torch import Tensor

from .activations import Activation, get_activation
from .portable import row_product, segments, wide


def _hidden(act: Activation, pre: Tensor) -> Tensor:
    """act(pre), or act(gate) * up for a gated (n, 2, F) pre-activation."""
    return act.forward(pre) if pre.dim() == 2 else act.forward(pre[:, 0]).mul_(pre[:, 1])


def _hidden_backward(act: Activation, grad: Tensor, pre: Tensor) -> Tensor:
    if pre.dim() == 2:
        return act.backward(grad, pre)
    d_pre = pre.new_empty(pre.shape)
    d_pre[:, 0] = act.backward(grad * pre[:, 1], pre[:, 0])
    d_pre[:, 1] = grad * act.forward(pre[:, 0])
    return d_pre


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
    """(y_TO, pre): pre is the pre-activation (N, F) or (N, 2, F) for backward, empty without `save`."""
    act = get_activation(activation)
    w1_flat = w1.flatten(1, 2) if w1.dim() == 4 else w1
    pre = x_TD.new_zeros((len(unit_N), *w1.shape[1:-1]) if save else (0,))
    y_TO = x_TD.new_zeros((len(x_TD), w2.shape[1]), dtype=wide(x_TD.dtype))
    for slot, start, stop in segments(counts_E, slot_E):
        unit = unit_N[start:stop]
        p = row_product(x_TD.index_select(0, unit), w1_flat[slot].t())
        p = p.view(-1, *w1.shape[1:-1])
        if b1 is not None:
            p += b1[slot]
        if save:
            pre[start:stop] = p
        y = row_product(_hidden(act, p), w2[slot].t())
        if b2 is not None:
            y += b2[slot]
        y = y.to(y_TO.dtype)
        if weight_N is not None:
            y = y * weight_N[start:stop, None]
        y_TO.index_add_(0, unit, y)
    return y_TO.to(x_TD.dtype), pre


def grouped_mlp_backward(
    grad_TO: Tensor,
    pre: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, w1, b1, w2, b2); an empty tensor for those not asked for."""
    act = get_activation(activation)
    dtype, acc = x_TD.dtype, wide(x_TD.dtype)
    w1_flat = w1.flatten(1, 2) if w1.dim() == 4 else w1
    shapes = (x_TD.shape, (len(unit_N),), w1.shape, w1.shape[:-1], w2.shape, w2.shape[:2])
    dtypes = (acc, acc if weight_N is None else weight_N.dtype, dtype, dtype, dtype, dtype)
    d_x, d_weight, d_w1, d_b1, d_w2, d_b2 = (
        x_TD.new_zeros(shape if need else (0,), dtype=kind)
        for shape, kind, need in zip(shapes, dtypes, needs, strict=True)
    )
    for slot, start, stop in segments(counts_E, slot_E):
        unit, p = unit_N[start:stop], pre[start:stop]
        dy = grad_TO.index_select(0, unit)
        hidden = _hidden(act, p)
        weight = None if weight_N is None else weight_N[start:stop, None]
        if needs[1]:
            d_weight[start:stop] = ((row_product(dy, w2[slot])).to(acc) * hidden).sum(1)
            if b2 is not None:
                d_weight[start:stop] += (dy.to(acc) * b2[slot]).sum(1)
        if weight is not None:
            dy = (dy * weight).to(dtype)
        if needs[4]:
            d_w2[slot].addmm_(dy.t(), hidden)
        if needs[5]:
            d_b2[slot] += dy.sum(0, dtype=acc).to(dtype)
        if not (needs[0] or needs[2] or needs[3]):
            continue
        d_pre = _hidden_backward(act, row_product(dy, w2[slot]), p).flatten(1)
        if needs[2]:
            d_w1.view_as(w1_flat)[slot].addmm_(d_pre.t(), x_TD.index_select(0, unit))
        if needs[3]:
            d_b1[slot] += d_pre.sum(0, dtype=acc).to(dtype).view(d_b1.shape[1:])
        if needs[0]:
            d_x.index_add_(0, unit, row_product(d_pre, w1_flat[slot]).to(acc))
    return d_x.to(dtype), d_weight, d_w1, d_b1, d_w2, d_b2


KERNELS = {"grouped_mlp": grouped_mlp, "grouped_mlp_backward": grouped_mlp_backward}
