"""The fused grouped MLP in plain PyTorch: waves of experts, keeping only the pre-activation.

Weights of rows never scale a hidden tensor: they enter where rows are gathered or summed, in fp32. Everything
as wide as a wave is written to buffers that all waves share: fresh pages cost as much as products.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .activations import Activation, get_activation, hidden_forward
from .backend import Kernel
from .bags import RowSource, sum_here
from .memory import empty
from .packing import unpack_mlp
from .portable_mlp_backward import grouped_mlp_backward
from .products import row_product, slack, turning_pays
from .waves import Wave, room, waves


class _First:
    """The first layer of all slots, with rows for gate and up side by side."""

    def __init__(self, w1: Tensor, b1: Tensor | None) -> None:
        self.w1, self.b1 = w1.flatten(1, -2), None if b1 is None else b1.flatten(1)

    def of(self, slot: int) -> tuple[Tensor, Tensor | None]:
        return self.w1[slot].t(), None if self.b1 is None else self.b1[slot]

    def run(self, wave: Wave, x: Tensor, pre: Tensor) -> None:
        """From the rows of a wave to `pre`."""
        for part in wave.parts:
            row_product(x[part.rows], *self.of(part.slot), out=pre[part.rows])


def _clear_unwritten(pre_N: Tensor, counts_E: Tensor, slot_E: Tensor | None) -> None:
    """Zeros for rows of absent experts and past the total."""
    pre_N[int(counts_E.sum()) :] = 0
    if slot_E is not None:
        pre_N[(slot_E < 0).repeat_interleave(counts_E).nonzero()[:, 0]] = 0


def grouped_mlp_pre(
    x_TD: Tensor, unit_N: Tensor, counts_E: Tensor, slot_E: Tensor | None, w1: Tensor, b1: Tensor | None
) -> Tensor:
    """The pre-activation that `grouped_mlp` saves, of the same bits."""
    first, source, spare = _First(w1, b1), RowSource(x_TD, unit_N), slack(x_TD.dtype)
    pre_N = empty(x_TD, (len(unit_N) + spare, first.w1.shape[1]))
    for wave in waves(counts_E, slot_E, x_TD.dtype):
        x = source.take(wave.start, wave.stop, wave.size)
        first.run(wave, x, pre_N[wave.start : wave.start + wave.size])
    _clear_unwritten(pre_N, counts_E, slot_E)
    return pre_N


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """Both layers of all slots."""

    act: Activation
    gated: bool
    first: _First
    w2: Tensor
    b2: Tensor | None

    def second(self, slot: int) -> tuple[Tensor, Tensor | None]:
        return self.w2[slot].t(), None if self.b2 is None else self.b2[slot]

    def turning_pays(self, wave: Wave) -> bool:
        sizes = ((part.slot, part.rows.stop - part.rows.start) for part in wave.parts)
        return all(turning_pays(size, self.first.w1[slot], self.w2[slot]) for slot, size in sizes)

    def run(self, wave: Wave, x: Tensor, pre: Tensor, hidden: Tensor, y: Tensor) -> None:
        """From the rows of a wave to `y`, through `pre` and `hidden`."""
        self.first.run(wave, x, pre)
        hidden_forward(self.act, pre, self.gated, out=hidden)
        for part in wave.parts:
            row_product(hidden[part.rows], *self.second(part.slot), out=y[part.rows])

    def run_turned(self, wave: Wave, x: Tensor, y: Tensor) -> None:
        """The same with hidden tensors that are never turned back, and so are those of one expert."""
        for part in wave.parts:
            pre = row_product(x[part.rows], *self.first.of(part.slot), turned=True)
            hidden = hidden_forward(self.act, pre, self.gated)
            row_product(hidden, *self.second(part.slot), out=y[part.rows], turned=True)


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
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y_TO, pre): pre is the pre-activation, (N + slack, F or 2F), empty without `save`.

    Its rows are those of unit_N; of absent experts and past the total they are zeros. With `recompute` y has
    the bits that it has with `save`; with neither it may be computed in another order.
    """
    first = _First(w1, b1)
    layers = _Layers(act=get_activation(activation), gated=w1.dim() == 4, first=first, w2=w2, b2=b2)
    source, spare, inner = RowSource(x_TD, unit_N), slack(x_TD.dtype), first.w1.shape[1]
    plan = list(waves(counts_E, slot_E, x_TD.dtype))
    pre_N = empty(x_TD, (len(unit_N) + spare if save else 0, inner))
    y_NO = empty(x_TD, (len(unit_N) + spare, w2.shape[1]))
    pre_room = empty(x_TD, (0 if save else room(plan), inner))
    hidden_room = empty(x_TD, (room(plan), w2.shape[2]))
    for wave in plan:
        x, y = source.take(wave.start, wave.stop, wave.size), y_NO[wave.start :]
        if not save and not recompute and layers.turning_pays(wave):
            layers.run_turned(wave, x, y)
        else:
            pre = pre_N[wave.start :] if save else pre_room
            layers.run(wave, x, pre[: wave.size], hidden_room[: wave.size], y)
    if save:
        _clear_unwritten(pre_N, counts_E, slot_E)
    return sum_here(y_NO, unit_N, weight_N, counts_E, slot_E, len(x_TD)), pre_N


def grouped_mlp_packed(
    x_TD: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    slot_E: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden_dim: int,
    output_dim: int,
    activation: str,
) -> Tensor:
    """y_TO; unpacks the weights at every call."""
    w1, w2 = unpack_mlp(w1, w2, x_TD.shape[1], hidden_dim, output_dim)
    args = x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2, activation
    return grouped_mlp(*args, save=False)[0]


KERNELS: dict[str, Kernel] = {
    "grouped_mlp": grouped_mlp,
    "grouped_mlp_packed": grouped_mlp_packed,
    "grouped_mlp_backward": grouped_mlp_backward,
    "grouped_mlp_pre": grouped_mlp_pre,
}
