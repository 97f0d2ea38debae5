"""The native CPU backend: tensors to addresses and sizes, and one call into the library."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from flexpert.core.errors import FlexpertError, InputError
from flexpert.ops import packing
from flexpert.ops.activations import get_activation
from flexpert.ops.backend import CallFacts, Kernel
from flexpert.ops.memory import empty
from flexpert.ops.products import slack

from . import layer, route, rows
from .build import native
from .checks import check, check_inputs, check_packed
from .layer import NUMBER, SUFFIX
from .threads import num_threads

# The fields of ForwardCall and BackwardCall: 64-bit integers, tensors by their address, null for none.
FORWARD = struct.Struct("=24q")
BACKWARD = struct.Struct("=28q")
_FAILURES = {
    1: "counts_E adds up to more rows than unit_N has, or has a negative count",
    2: "unit_N has an index outside [0, T)",
    3: "slot_E has a slot outside [-1, S)",
}

_functions: dict[tuple[str, torch.dtype, str], Callable[[bytes], int]] = {}


def verify(facts: CallFacts) -> str | None:
    """None if the native kernels can run such calls, else why not. Builds the library at its first use."""
    if facts.device != "cpu":
        return f"runs on cpu, not on {facts.device}"
    dtypes = route.DTYPES.get(facts.operator, tuple(SUFFIX))
    if facts.dtype not in dtypes:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"has no kernels for {facts.dtype}, only for {names}"
    found = native()
    return found.reason if found.library is None else None


def instructions(facts: CallFacts) -> str:
    """What such calls, which `verify` accepts, compute with."""
    is_wide = facts.operator in route.DTYPES or facts.operator in rows.KERNELS
    return native().instructions(torch.float32 if is_wide else facts.dtype)


def _function(name: str, dtype: torch.dtype) -> Callable[[bytes], int]:
    uses = native().instructions(dtype)
    found = _functions.get((name, dtype, uses))
    if found is None:
        suffix = "_avx2" if uses == "AVX2" else ""
        found = getattr(native().library, f"flexpert_{name}_{SUFFIX[dtype]}{suffix}")
        found.argtypes, found.restype = (ctypes.c_char_p,), ctypes.c_int64
        _functions[name, dtype, uses] = found
    return found


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(function: Callable[[bytes], int], call: bytes) -> None:
    status = function(call)
    if status in _FAILURES:
        raise InputError(f"grouped_mlp: {_FAILURES[status]}")
    if status:
        raise FlexpertError("grouped_mlp: not enough memory for its packed operands")


def _dense(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor`, contiguous and of `dtype`."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def _sizes(
    x_TD: Tensor, unit_N: Tensor, counts_E: Tensor, w2: tuple[int, ...], gated: bool, activation: str
) -> tuple[int, ...]:
    """The fields both calls begin with; `w2` is the shape of unpacked weights."""
    get_activation(activation)  # refuses unknown names
    slots, output_dim, hidden_dim = w2
    rows, experts = unit_N.shape[0], counts_E.shape[0]
    units, model_dim = x_TD.shape
    return (
        units, rows, model_dim, hidden_dim, output_dim, experts, slots, gated, NUMBER[activation],
        num_threads(), native().instructions(x_TD.dtype) == "AMX",
    )  # fmt: skip


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
    """(y_TO, pre): pre is the pre-activation (N + slack, F or 2F) for backward, empty without `save`."""
    check_inputs(x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2)
    dtype, rows, width = x_TD.dtype, unit_N.shape[0], w1.shape[1:-1].numel()
    pre = empty(x_TD, (rows + slack(dtype) if save else 0, width))
    if save:
        pre[rows:] = 0  # room that only the portable kernels use
    y_TO = empty(x_TD, (x_TD.shape[0], w2.shape[1]))
    inputs = (
        _dense(x_TD, dtype), unit_N.contiguous(), _dense(weight_N, torch.float32), counts_E.contiguous(),
        None if slot_E is None else slot_E.contiguous(), w1.contiguous(), _dense(b1, dtype), w2.contiguous(),
        _dense(b2, dtype),
    )  # fmt: skip
    y_rows = empty(x_TD, (rows, w2.shape[1]))
    outputs = pre if save else None, y_rows, y_TO
    sizes = _sizes(x_TD, unit_N, counts_E, w2.shape, w1.dim() == 4, activation)
    call = FORWARD.pack(*sizes, False, *map(_address, (*inputs, *outputs)))
    _run(_function("mlp", dtype), call)
    return y_TO, pre


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
    """y_TO; unpacks the weights where AVX2 runs bf16, as on another machine than packed them."""
    if x_TD.dtype != torch.bfloat16 or native().instructions(x_TD.dtype) == "AVX2":
        w1, w2 = packing.unpack_mlp(w1, w2, x_TD.shape[1], hidden_dim, output_dim)
        unpacked = x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2, activation
        return grouped_mlp(*unpacked, save=False)[0]
    args = x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2
    check_packed(*args, hidden_dim, output_dim)
    slots, rows, gated = len(w2), len(unit_N), w1.dim() == 5
    y_TO, y_rows = x_TD.new_empty(x_TD.shape[0], output_dim), empty(x_TD, (rows, output_dim))
    tensors = (
        x_TD.contiguous(), unit_N.contiguous(), _dense(weight_N, torch.float32), counts_E.contiguous(),
        None if slot_E is None else slot_E.contiguous(), w1.contiguous(), _dense(b1, x_TD.dtype),
        w2.contiguous(), _dense(b2, x_TD.dtype), None, y_rows, y_TO,
    )  # fmt: skip
    sizes = _sizes(x_TD, unit_N, counts_E, (slots, output_dim, hidden_dim), gated, activation)
    _run(_function("mlp", x_TD.dtype), FORWARD.pack(*sizes, True, *map(_address, tensors)))
    return y_TO


def grouped_mlp_pre(
    x_TD: Tensor, unit_N: Tensor, counts_E: Tensor, slot_E: Tensor | None, w1: Tensor, b1: Tensor | None
) -> Tensor:
    """The pre-activation that `grouped_mlp` saves, of the same bits."""
    no_outputs = w1.new_empty(len(w1), 0, w1.shape[-2])  # whose second product is skipped
    args = x_TD, unit_N, None, counts_E, slot_E, w1, b1, no_outputs, None, "identity"
    _, pre = grouped_mlp(*args, save=True)
    return pre


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
    check_inputs(x_TD, unit_N, weight_N, counts_E, slot_E, w1, None, w2, b2)
    kept = len(unit_N) + slack(x_TD.dtype), w1.shape[1:-1].numel()
    check({"grad": (grad_TO, (len(x_TD), w2.shape[1])), "pre": (pre, kept)}, x_TD.dtype)
    dtype, shapes = x_TD.dtype, (x_TD.shape, unit_N.shape, w1.shape, w1.shape[:-1], w2.shape, w2.shape[:2])
    needs = [needs[0], needs[1] and weight_N is not None, *needs[2:]]
    weight = x_TD.new_empty(0, dtype=torch.float32)
    likes = (x_TD, weight, w1, w1, w2, w2)
    grads = [
        empty(like, shape if need else (0,)) for like, shape, need in zip(likes, shapes, needs, strict=True)
    ]
    inputs = (
        x_TD.contiguous(), unit_N.contiguous(), _dense(weight_N, torch.float32), counts_E.contiguous(),
        None if slot_E is None else slot_E.contiguous(), w1.contiguous(), w2.contiguous(), _dense(b2, dtype),
        grad_TO.contiguous(), pre.contiguous(),
    )  # fmt: skip
    d_rows = empty(x_TD, (len(unit_N) if needs[0] else 0, x_TD.shape[1]))
    outputs = [d_rows, *(grad if need else None for grad, need in zip(grads, needs, strict=True))]
    sizes = _sizes(x_TD, unit_N, counts_E, w2.shape, w1.dim() == 4, activation)
    call = BACKWARD.pack(*sizes, *map(_address, (*inputs, *outputs)))
    _run(_function("mlp_backward", dtype), call)
    d_x, d_weight, d_w1, d_b1, d_w2, d_b2 = grads
    if weight_N is not None:
        d_weight = d_weight.to(weight_N.dtype)
    return d_x, d_weight, d_w1, d_b1, d_w2, d_b2


KERNELS: dict[str, Kernel] = {
    "grouped_mlp": grouped_mlp,
    "grouped_mlp_packed": grouped_mlp_packed,
    "grouped_mlp_backward": grouped_mlp_backward,
    "grouped_mlp_pre": grouped_mlp_pre,
    **route.KERNELS,
    **rows.KERNELS,
}
SHORTCUTS = layer.SHORTCUTS
