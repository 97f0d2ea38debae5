"""Native routing: tensors to addresses and sizes, and one call into the library."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from flexpert.core.errors import ConfigError, InputError
from flexpert.ops import portable_route
from flexpert.ops.backend import Kernel
from flexpert.ops.memory import empty

from .build import native
from .calls import check, run
from .threads import num_threads

SCORINGS = ("softmax", "sigmoid", "sqrt_softplus", "uniform")
FEW_TOKENS = 64  # up to which logits are computed from operands as they are

# The dtypes of the first argument that these kernels take.
DTYPES = {
    "assign": (torch.int64,),
    "route": (torch.float32,),
    "route_backward": (torch.float32,),
    "router_logits": (torch.float32, torch.bfloat16),
    "router_logits_backward": (torch.float32,),
}

# The fields of the calls in csrc/route.h, logits.h and linear_score.h: 64-bit integers, tensors by address,
# null for none.
_ROUTE = struct.Struct("=17qd")
_ROUTE_BACKWARD = struct.Struct("=13qd")
_ASSIGN = struct.Struct("=7q")
_LOGITS = struct.Struct("=7q")
_SCORE = struct.Struct("=8q")
_SCORE_BACKWARD = struct.Struct("=10q")

_REFUSAL = "ids_TK or order_N has a number outside its range"


def _scoring(name: str) -> int:
    if name not in SCORINGS:
        raise ConfigError(f"unknown scoring {name!r}; choose one of: {', '.join(SCORINGS)}")
    return SCORINGS.index(name)


def assign(key_N: Tensor, num_bins: int, capacity_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """(order_N, counts_B)."""
    key_N = key_N.contiguous()
    check("assign", key_N=(key_N, (key_N.numel(),), torch.int64))
    capacity = 0
    if capacity_B is not None:
        check("assign", capacity_B=(capacity_B, (num_bins,), torch.int64))
        capacity_B = capacity_B.contiguous()
        capacity = capacity_B.data_ptr()
    order_N, counts_B = torch.empty_like(key_N), key_N.new_empty(num_bins)
    addresses = key_N.data_ptr(), capacity, order_N.data_ptr(), counts_B.data_ptr()
    run("assign", _ASSIGN.pack(key_N.shape[0], num_bins, num_threads(), *addresses))
    return order_N, counts_B


def route(
    logits_TE: Tensor,
    top_k: int,
    scoring: str,
    bias_E: Tensor | None,
    normalize: bool,
    scale: float,
    limit: int,
    prioritized: bool,
) -> tuple[Tensor, ...]:
    """(score_TE, ids_TK, order_N, unit_N, weight_N, counts_E, slot_N)."""
    tokens, num_experts = logits_TE.shape
    if not 1 <= top_k <= num_experts:
        raise InputError(f"route: top_k={top_k} of {num_experts} experts")
    bias = 0
    if bias_E is not None:
        check("route", bias_E=(bias_E, (num_experts,), torch.float32))
        bias_E = bias_E.contiguous()
        bias = bias_E.data_ptr()
    logits_TE, rows, kind = logits_TE.contiguous(), tokens * top_k, torch.int64
    new = logits_TE.new_empty
    score_TE, ids_TK = new(tokens, num_experts), new(tokens, top_k, dtype=kind)
    order_N, unit_N, weight_N = new(rows, dtype=kind), new(rows, dtype=kind), new(rows)
    counts_E, slot_N = new(num_experts, dtype=kind), new(0 if limit < 0 else rows, dtype=kind)
    outputs = score_TE, ids_TK, order_N, unit_N, weight_N, counts_E, slot_N
    call = _ROUTE.pack(
        tokens, num_experts, top_k, _scoring(scoring), normalize, limit, prioritized, num_threads(),
        logits_TE.data_ptr(), bias, *[output.data_ptr() for output in outputs], scale,
    )  # fmt: skip
    run("route", call)
    return outputs


def route_backward(
    score_TE: Tensor,
    ids_TK: Tensor,
    order_N: Tensor,
    counts_E: Tensor,
    d_score_TE: Tensor | None,
    d_weight_N: Tensor | None,
    scoring: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits."""
    (tokens, num_experts), top_k, real = score_TE.shape, ids_TK.shape[1], score_TE.dtype
    inputs: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
        "ids_TK": (ids_TK, (tokens, top_k), torch.int64),
        "order_N": (order_N, (tokens * top_k,), torch.int64),
        "counts_E": (counts_E, (num_experts,), torch.int64),
    }
    if d_score_TE is not None:
        d_score_TE = d_score_TE.contiguous()
        inputs["d_score_TE"] = d_score_TE, score_TE.shape, real
    if d_weight_N is not None:
        d_weight_N = d_weight_N.contiguous()
        inputs["d_weight_N"] = d_weight_N, order_N.shape, real
    check("route_backward", **inputs)
    d_logits_TE = score_TE.new_empty(tokens, num_experts)
    tensors = [tensor.contiguous() for tensor in (score_TE, ids_TK, order_N, counts_E)]
    call = _ROUTE_BACKWARD.pack(
        tokens, num_experts, top_k, _scoring(scoring), normalize, num_threads(),
        *[tensor.data_ptr() for tensor in tensors],
        *[0 if grad is None else grad.data_ptr() for grad in (d_score_TE, d_weight_N)],
        d_logits_TE.data_ptr(), scale,
    )  # fmt: skip
    run("route_backward", call, refusal=_REFUSAL)
    return d_logits_TE


def router_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """x W^T in fp32."""
    (tokens, size), num_experts = x_TD.shape, len(w_ED)
    is_many = tokens > FEW_TOKENS
    if is_many and not _multiplies_half(x_TD, w_ED):
        return portable_route.router_logits(x_TD, w_ED)
    check("router_logits", w_ED=(w_ED, (num_experts, size), x_TD.dtype))
    x_TD, w_ED = x_TD.contiguous(), w_ED.contiguous()
    logits_TE = x_TD.new_empty(tokens, num_experts, dtype=torch.float32)
    addresses = x_TD.data_ptr(), w_ED.data_ptr(), logits_TE.data_ptr()
    if is_many:
        call = _SCORE.pack(tokens, num_experts, size, num_threads(), _has_amx(), *addresses)
        run("score_bf16", call, dtype=torch.bfloat16)
    else:
        call = _LOGITS.pack(tokens, num_experts, size, num_threads(), *addresses)
        run("router_logits", call, x_TD.dtype == torch.bfloat16)
    return logits_TE


def router_logits_backward(
    grad_TE: Tensor, x_TD: Tensor, w_ED: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, w); an empty tensor for those not asked for."""
    (tokens, size), num_experts = x_TD.shape, len(w_ED)
    if tokens <= FEW_TOKENS or not _multiplies_half(x_TD, w_ED):
        return portable_route.router_logits_backward(grad_TE, x_TD, w_ED, needs)
    check(
        "router_logits_backward",
        w_ED=(w_ED, (num_experts, size), x_TD.dtype),
        grad_TE=(grad_TE, (tokens, num_experts), torch.float32),
    )
    grad_TE, x_TD, w_ED = grad_TE.contiguous(), x_TD.contiguous(), w_ED.contiguous()
    shapes = [like.shape if need else (0,) for like, need in zip((x_TD, w_ED), needs, strict=True)]
    d_x, d_w = empty(x_TD, shapes[0]), empty(w_ED, shapes[1])
    inputs = [tensor.data_ptr() for tensor in (grad_TE, x_TD, w_ED)]
    outputs = [tensor.data_ptr() if need else 0 for tensor, need in zip((d_x, d_w), needs, strict=True)]
    sizes = tokens, num_experts, size, num_threads(), _has_amx()
    run("score_backward_bf16", _SCORE_BACKWARD.pack(*sizes, *inputs, *outputs), dtype=torch.bfloat16)
    return d_x, d_w


def _multiplies_half(*operands: Tensor) -> bool:
    """Whether all are bf16 and the processor multiplies it: in fp32 MKL's products have nothing to widen."""
    is_half = all(operand.dtype == torch.bfloat16 for operand in operands)
    return is_half and native().instructions(torch.bfloat16) != "AVX2"


def _has_amx() -> bool:
    return native().instructions(torch.bfloat16) == "AMX"


KERNELS: dict[str, Kernel] = {
    "assign": assign,
    "route": route,
    "route_backward": route_backward,
    "router_logits": router_logits,
    "router_logits_backward": router_logits_backward,
}
