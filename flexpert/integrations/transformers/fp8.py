"""The experts implementation `flexpert` on FP8 weights: one expert at a time, widened where it is used.

Weights are `torch.float8_e4m3fn` with one scale per block. Activations are not quantised, so results are
those of the stored weights in the tokens' dtype. Letters as in `experts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexpert import ops
from flexpert.core.errors import InputError

from .experts import experts_forward, regroup
from .layout import first_name


def fp8_experts_forward(self: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """As `experts_forward`; gradients reach tokens and routing weights, not the quantised weights.

    Raises:
        InputError: weights that are packed otherwise (FP4), or activation scales of a static scheme.
    """
    experts: Any = self
    first = first_name(experts)
    w1 = getattr(experts, first)
    if w1.element_size() > 1:
        return experts_forward(self, hidden_TD, ids_TK, weights_TK)
    _check(experts, w1)
    unit_N, weight_N, counts_E = regroup(ids_TK, weights_TK, w1.shape[0], hidden_TD)
    rows_ND = ops.gather_rows(hidden_TD, unit_N, counts_E)
    blocks = experts.block_size
    pre = WidenedLinear.apply(rows_ND, w1, getattr(experts, f"{first}_scale_inv"), counts_E, blocks)
    hidden = experts._apply_gate(pre) if experts.has_gate else experts.act_fn(pre)
    rows_NF, scale = hidden.to(hidden_TD.dtype), experts.down_proj_scale_inv
    y_ND = WidenedLinear.apply(rows_NF, experts.down_proj, scale, counts_E, blocks)
    return ops.scatter_combine(y_ND, unit_N, weight_N, counts_E, hidden_TD.shape[0], hidden_TD.dtype)


def _check(experts: Any, w1: Tensor) -> None:
    name = type(experts).__name__
    if w1.dtype is not torch.float8_e4m3fn:
        raise InputError(
            f"{name} holds weights of {w1.dtype}; experts_implementation='flexpert' reads "
            f"torch.float8_e4m3fn: load the model with FineGrainedFP8Config(dequantize=True), or choose "
            f"another implementation"
        )
    if experts.activation_scheme != "dynamic":
        raise InputError(
            f"{name} has activation_scheme={experts.activation_scheme!r}; experts_implementation='flexpert' "
            f"does not quantise activations: choose 'eager' for it"
        )


def widen(weight: Tensor, scale: Tensor, block_size: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
    """weight (F, D) times the scales of its blocks, (F blocks, D blocks)."""
    scale = scale.to(torch.float32)
    for dim, size in enumerate(weight.shape):
        count = scale.shape[dim]
        block = size if block_size is None else block_size[dim]
        if -(-size // block) != count:  # a projection smaller than a block still has a scale for each half
            block = -(-size // count)
        scale = scale.repeat_interleave(block, dim).narrow(dim, 0, size)
    return (weight.to(torch.float32) * scale).to(dtype)


class WidenedLinear(torch.autograd.Function):
    """y_NF of `ops.grouped_linear` with quantised weights, which backward widens once more."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        w: Tensor,
        scale: Tensor,
        counts_E: Tensor,
        block_size: Sequence[int] | None,
    ) -> Tensor:
        """One product per expert that has rows."""
        ctx.save_for_backward(w, scale, counts_E)
        ctx.block_size = block_size
        y_NF = rows_ND.new_zeros(len(rows_ND), w.shape[1])
        for expert, rows in _runs(counts_E):
            weight = widen(w[expert], scale[expert], block_size, rows_ND.dtype)
            torch.mm(rows_ND[rows], weight.t(), out=y_NF[rows])
        return y_NF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the rows alone."""
        w, scale, counts_E = ctx.saved_tensors
        (grad_NF,) = grads
        d_rows = grad_NF.new_zeros(len(grad_NF), w.shape[2])
        for expert, rows in _runs(counts_E):
            weight = widen(w[expert], scale[expert], ctx.block_size, grad_NF.dtype)
            torch.mm(grad_NF[rows], weight, out=d_rows[rows])
        return d_rows, None, None, None, None


def _runs(counts_E: Tensor) -> list[tuple[int, slice]]:
    counts, ends = counts_E.tolist(), counts_E.cumsum(0).tolist()
    return [(e, slice(ends[e] - counts[e], ends[e])) for e in range(len(ends)) if counts[e]]
