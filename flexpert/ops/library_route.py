"""The routing operators of `torch.ops.flexpert`; see `library`, which it completes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bags import wide
from .library import OPERATORS, _asked, _define, _fake, _given, _refuse_twice, _register_autograd, _twin

__all__ = ["OPERATORS"]  # with those of routing among them

_define(
    {
        "route": (
            "(Tensor logits, SymInt top_k, str scoring, Tensor? bias, bool normalize, float scale,"
            " SymInt limit, bool prioritized) -> (Tensor score, Tensor ids, Tensor order, Tensor unit,"
            " Tensor weight, Tensor counts, Tensor slot)"
        ),
        "route_backward": (
            "(Tensor score, Tensor ids, Tensor order, Tensor counts, Tensor? d_score, Tensor? d_weight,"
            " str scoring, bool normalize, float scale) -> Tensor"
        ),
        "router_logits": "(Tensor x, Tensor w) -> Tensor",
        "router_logits_backward": "(Tensor grad, Tensor x, Tensor w, bool[] needs) -> (Tensor, Tensor)",
    }
)


@_fake("route")
def _(
    logits: Tensor,
    top_k: int,
    scoring: str,
    bias: Tensor | None,
    normalize: bool,
    scale: float,
    limit: int,
    prioritized: bool,
) -> tuple[Tensor, ...]:
    tokens, num_experts = logits.shape
    rows = tokens * top_k

    def ids(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.int64)

    score, weight = logits.new_empty(tokens, num_experts), logits.new_empty(rows)
    slot = ids(0 if limit < 0 else rows)
    return score, ids(tokens, top_k), ids(rows), ids(rows), weight, ids(num_experts), slot


@_fake("route_backward")
def _(
    score: Tensor,
    ids: Tensor,
    order: Tensor,
    counts: Tensor,
    d_score: Tensor | None,
    d_weight: Tensor | None,
    scoring: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    return score.new_empty(score.shape)


@_fake("router_logits")
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=wide(x.dtype))


@_fake("router_logits_backward")
def _(grad: Tensor, x: Tensor, w: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    return _asked(x, [x.shape, w.shape], needs, [x.dtype, w.dtype])


def _setup_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    score, ids, order, unit, _, counts, slot = output
    ctx.mark_non_differentiable(ids, order, unit, counts, slot)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(score, ids, order, counts)
    ctx.rules = inputs[2], inputs[4], inputs[5]


def _backward_route(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    d_score, d_weight = grads[0], grads[4]
    d_logits = None
    if d_score is not None or d_weight is not None:
        d_logits = _twin("route_backward", *ctx.saved_tensors, d_score, d_weight, *ctx.rules)
    return d_logits, *[None] * 7


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_logits(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad)
    return tuple(_given(_twin("router_logits_backward", grad, *ctx.saved_tensors, needs), needs))


for _name in ("route", "router_logits"):
    _refuse_twice(_name)
_register_autograd("route", _backward_route, _setup_route)
_register_autograd("router_logits", _backward_logits, _setup_logits)
