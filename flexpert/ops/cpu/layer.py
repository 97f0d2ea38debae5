"""All of a layer for few tokens in one call into the library; None for calls of an unusual kind."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexpert.core.errors import FlexpertError
from flexpert.ops.backend import Kernel
from flexpert.ops.packing import BLOCK, TILE

from .build import native
from .route import SCORINGS
from .threads import num_threads

if TYPE_CHECKING:
    from flexpert.ops.handles import ExpertMLP, TokenChoice

NAMES = ("gelu", "gelu_tanh", "identity", "relu", "sigmoid", "silu", "squared_relu", "tanh")
NUMBER = {name: number for number, name in enumerate(NAMES)}
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

_LAYER = struct.Struct("=39qd")  # the fields of LayerCall in csrc/calls.h
_Function = Callable[[bytes], int]
_functions: dict[tuple[torch.dtype, str, str], tuple[_Function, tuple[int, int, int], bool]] = {}


def _found(dtype: torch.dtype) -> tuple[_Function, tuple[int, int, int], bool]:
    """The function for a layer, the addresses of those that it calls, and whether they use AMX."""
    found = native()
    uses, routes = found.instructions(dtype), found.instructions(torch.float32)
    known = _functions.get((dtype, uses, routes))
    if known is None:
        library = found.library
        assert library is not None
        of_mlp, of_routes = ("_avx2" if name == "AVX2" else "" for name in (uses, routes))
        names = (
            f"flexpert_router_logits{of_routes}",
            f"flexpert_route{of_routes}",
            f"flexpert_mlp_{SUFFIX[dtype]}{of_mlp}",
        )
        places = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
        function = library.flexpert_layer
        function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int64
        known = _functions[dtype, uses, routes] = function, (places[0], places[1], places[2]), uses == "AMX"
    return known


def _sizes(x_TD: Tensor, mlp: ExpertMLP) -> tuple[int, int, int, bool] | None:
    """(F, O, E, gated) where the tensors fit each other and lie as the kernels read them."""
    w1, b1, w2, b2 = mlp[:4]
    if not (x_TD.dim() == 2 and x_TD.dtype == w1.dtype == w2.dtype and mlp.activation in NUMBER):
        return None
    model = x_TD.shape[1]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    if mlp.packed is None:
        if w2.dim() != 3 or w1.dim() not in (3, 4):
            return None
        experts, output, hidden = w2.shape
        gated = w1.dim() == 4
        shapes = (experts, 2, hidden, model) if gated else (experts, hidden, model), w2.shape
    else:
        (hidden, output), experts, gated = mlp.packed, len(w2), w1.dim() == 5
        rows, columns, outputs = (-(-size // BLOCK) for size in (hidden, model, output))
        first = (experts, rows, 2, columns, TILE) if gated else (experts, rows, columns, TILE)
        shapes = first, (experts, outputs, rows, TILE)
    if not (w1.shape == shapes[0] and w2.shape == shapes[1]):
        return None
    if b1 is not None or b2 is not None:
        inner = (experts, 2, hidden) if gated else (experts, hidden)
        for bias, shape in ((b1, inner), (b2, (experts, output))):
            if bias is not None and not _is(bias, shape, x_TD.dtype):
                return None
    if not (x_TD.is_contiguous() and w1.is_contiguous() and w2.is_contiguous() and w1.is_cpu and w2.is_cpu):
        return None
    return hidden, output, experts, gated


def _is(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous() and tensor.is_cpu


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(
    x_TD: Tensor,
    mlp: ExpertMLP,
    sizes: tuple[int, int, int, bool],
    rules: tuple[int, int, bool, int, bool],
    tensors: tuple[int, int, int, int],
    scale: float,
) -> Tensor:
    """`rules` are LayerCall's from top_k on, `tensors` its addresses from `router` on."""
    function, places, amx = _found(x_TD.dtype)
    (tokens, model), (hidden, output, experts, gated), top_k = x_TD.shape, sizes, rules[0]
    y_TO = x_TD.new_empty(tokens, output)
    call = _LAYER.pack(
        *places, x_TD.dtype == torch.bfloat16, tokens, experts, *rules, *tensors,
        tokens, tokens * top_k, model, hidden, output, experts, experts, gated, NUMBER[mlp.activation],
        num_threads(), amx, mlp.packed is not None, x_TD.data_ptr(), 0, 0, 0, 0, mlp.w1.data_ptr(),
        _address(mlp.b1), mlp.w2.data_ptr(), _address(mlp.b2), 0, 0, y_TO.data_ptr(), scale,
    )  # fmt: skip
    if function(call):
        raise FlexpertError("a layer of few tokens: not enough memory")
    return y_TO


def routed_mlp(x_TD: Tensor, choice: TokenChoice, mlp: ExpertMLP) -> Tensor | None:
    """See `flexpert.ops.routed_mlp`."""
    sizes = _sizes(x_TD, mlp)
    weight_ED, top_k, scoring, bias_E, normalize, scale, limit, prioritized = choice
    if sizes is None or not 1 <= top_k <= sizes[2] or scoring not in SCORINGS:
        return None
    if not _is(weight_ED, (sizes[2], x_TD.shape[1]), x_TD.dtype):
        return None
    if bias_E is not None and not _is(bias_E, (sizes[2],), torch.float32):
        return None
    rules = top_k, SCORINGS.index(scoring), normalize, -1 if limit is None else limit, prioritized
    return _run(x_TD, mlp, sizes, rules, (weight_ED.data_ptr(), _address(bias_E), 0, 0), scale)


def chosen_mlp(x_TD: Tensor, chosen: tuple[Tensor, Tensor], mlp: ExpertMLP) -> Tensor | None:
    """See `flexpert.ops.chosen_mlp`."""
    ids_TK, weight_TK = chosen
    sizes = _sizes(x_TD, mlp)
    if sizes is None or ids_TK.dim() != 2 or len(ids_TK) != len(x_TD):
        return None
    if not (_is(ids_TK, ids_TK.shape, torch.int64) and _is(weight_TK, ids_TK.shape, torch.float32)):
        return None
    rules = ids_TK.shape[1], 0, False, -1, False
    return _run(x_TD, mlp, sizes, rules, (0, 0, ids_TK.data_ptr(), weight_TK.data_ptr()), 1.0)


SHORTCUTS: dict[str, Kernel] = {"routed_mlp": routed_mlp, "chosen_mlp": chosen_mlp}
