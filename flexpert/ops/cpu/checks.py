"""Kernels trust sizes: what PyTorch's operators would refuse is refused here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexpert.core.errors import InputError
from flexpert.ops import packing


def check(shapes: Mapping[str, tuple[Tensor | None, tuple[int, ...]]], dtype: torch.dtype | None) -> None:
    """Refuse tensors of another shape or device, or dtype where one is given; None is no tensor.

    Raises:
        InputError: the message names the tensor.
    """
    for name, (tensor, want) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != want:
            raise InputError(f"grouped_mlp: {name} has shape {tuple(tensor.shape)}, not {want}")
        if dtype is not None and tensor.dtype != dtype:
            raise InputError(f"grouped_mlp: {name} has dtype {tensor.dtype}, not x's {dtype}")
        if not tensor.is_cpu:
            raise InputError(f"grouped_mlp: {name} is on {tensor.device}, x on cpu; move one to the other")


def _is_usual(
    x_TD: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    slot_E: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
) -> bool:
    """What most calls are, but for the weights' shapes, at once: decoding waits for every microsecond."""
    return (
        x_TD.dtype == w1.dtype == w2.dtype
        and b1 is b2 is slot_E is None
        and counts_E.shape == (len(w2),)
        and counts_E.dtype == unit_N.dtype == torch.int64
        and unit_N.dim() == 1
        and w1.is_cpu
        and w2.is_cpu
        and unit_N.is_cpu
        and counts_E.is_cpu
        and (weight_N is None or (weight_N.shape == unit_N.shape and weight_N.is_cpu))
    )


def check_packed(
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
) -> None:
    """The arguments of `grouped_mlp_packed`."""
    slots, halves = len(w2), (2,) if w1.dim() == 5 else ()
    hidden, model, output = (-(-size // packing.BLOCK) for size in (hidden_dim, x_TD.shape[1], output_dim))
    first, second = (slots, hidden, *halves, model, packing.TILE), (slots, output, hidden, packing.TILE)
    args = x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2
    if w1.shape == first and w2.shape == second and _is_usual(*args):
        return
    biases = (b1, (slots, *halves, hidden_dim)), (b2, (slots, output_dim))
    check({"w1": (w1, first), "b1": biases[0], "w2": (w2, second), "b2": biases[1]}, x_TD.dtype)
    rows, experts = (len(unit_N),), (slots if slot_E is None else len(slot_E),)
    check({"weight_N": (weight_N, rows)}, None)
    indices = {"unit_N": (unit_N, rows), "counts_E": (counts_E, experts), "slot_E": (slot_E, experts)}
    check(indices, torch.int64)


def check_inputs(
    x_TD: Tensor,
    unit_N: Tensor,
    weight_N: Tensor | None,
    counts_E: Tensor,
    slot_E: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
) -> None:
    """The arguments of `grouped_mlp`, and what its backward pass has of them."""
    slots, output_dim, hidden_dim = w2.shape
    inner = (slots, 2, hidden_dim) if w1.dim() == 4 else (slots, hidden_dim)
    if w1.shape == (*inner, x_TD.shape[1]) and _is_usual(
        x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2
    ):
        return
    check(
        {"w1": (w1, (*inner, x_TD.shape[1])), "b1": (b1, inner), "w2": (w2, (slots, output_dim, hidden_dim)),
         "b2": (b2, (slots, output_dim))},
        x_TD.dtype,
    )  # fmt: skip
    check({"weight_N": (weight_N, (len(unit_N),))}, None)
    experts = (slots,) if slot_E is None else (len(counts_E),)
    mapped = ("counts_E", counts_E) if slot_E is None else ("slot_E", slot_E)
    check({mapped[0]: (mapped[1], experts)}, torch.int64)
    check({"unit_N": (unit_N, (len(unit_N),)), "counts_E": (counts_E, (len(counts_E),))}, torch.int64)
