"""The `torch.ops.flexpert` operators: schemas, shape-only kernels, autograd, and dispatch to a backend.

A differentiable operator `op` has a twin `op_backward` of one schema-declared kernel. The twins have no
derivative: differentiating twice raises, instead of giving a wrong second derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexpert.core.errors import FlexpertError, InputError

from . import select
from .products import is_transposed, slack
from .wanted import wanted_kernel, wanting
from .watched import is_unwatched

_SCHEMAS = {
    "assign": "(Tensor key, SymInt num_bins, Tensor? capacity) -> (Tensor, Tensor)",
    "gather_rows": "(Tensor x, Tensor unit, Tensor counts) -> Tensor",
    "gather_rows_backward": "(Tensor grad, Tensor unit, Tensor counts, SymInt num_units) -> Tensor",
    "grouped_linear": "(Tensor rows, Tensor w, Tensor? b, Tensor counts, Tensor? slot) -> Tensor",
    "grouped_linear_backward": (
        "(Tensor grad, Tensor rows, Tensor w, Tensor counts, Tensor? slot, bool[] needs)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "scatter_combine": (
        "(Tensor rows, Tensor unit, Tensor? weight, Tensor counts, SymInt num_units, ScalarType dtype)"
        " -> Tensor"
    ),
    "scatter_combine_backward": (
        "(Tensor grad, Tensor rows, Tensor unit, Tensor? weight, Tensor counts, bool[] needs)"
        " -> (Tensor, Tensor)"
    ),
    "grouped_mlp": (
        "(Tensor x, Tensor unit, Tensor? weight, Tensor counts, Tensor? slot, Tensor w1, Tensor? b1,"
        " Tensor w2, Tensor? b2, str activation, bool save, bool recompute=False) -> (Tensor, Tensor)"
    ),
    "grouped_mlp_packed": (
        "(Tensor x, Tensor unit, Tensor? weight, Tensor counts, Tensor? slot, Tensor w1, Tensor? b1,"
        " Tensor w2, Tensor? b2, SymInt hidden_dim, SymInt output_dim, str activation) -> Tensor"
    ),
    "grouped_mlp_pre": (
        "(Tensor x, Tensor unit, Tensor counts, Tensor? slot, Tensor w1, Tensor? b1) -> Tensor"
    ),
    "grouped_mlp_backward": (
        "(Tensor grad, Tensor pre, Tensor x, Tensor unit, Tensor? weight, Tensor counts, Tensor? slot,"
        " Tensor w1, Tensor w2, Tensor? b2, str activation, bool[] needs)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}

LIBRARY = torch.library.Library("flexpert", "DEF")
OPERATORS = torch.ops.flexpert


def _dispatcher(name: str) -> Callable[..., Any]:
    def call(first: Tensor, *rest: Any) -> Any:
        return select.kernel(name, first.device.type, first.dtype)(first, *rest)

    return call


def _define(schemas: dict[str, str]) -> None:
    for name, schema in schemas.items():
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, _dispatcher(name), "CompositeExplicitAutograd")


_define(_SCHEMAS)


# Shape-only kernels -------------------------------------------------------------------------------------


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    register = torch.library.register_fake(f"flexpert::{name}", lib=LIBRARY)

    def checked(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def run(*args: Any) -> Any:
            devices = {tensor.device.type: None for tensor in args if isinstance(tensor, Tensor)}
            if len(devices) > 1:
                raise InputError(f"{name}: tensors on {' and '.join(devices)}; move them to one device")
            return fake(*args)

        register(run)
        return run

    return checked


def _asked(
    like: Tensor, shapes: Sequence[tuple[int, ...]], needs: list[bool], dtypes: list[torch.dtype]
) -> tuple[Tensor, ...]:
    """Gradients as backward kernels return them: of the given shapes, empty where not asked for."""
    return tuple(
        like.new_empty(shape if need else (0,), dtype=dtype)
        for shape, need, dtype in zip(shapes, needs, dtypes, strict=True)
    )


@_fake("assign")
def _(key: Tensor, num_bins: int, capacity: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(key), key.new_empty(num_bins)


@_fake("gather_rows")
def _(x: Tensor, unit: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(unit.shape[0], x.shape[1])


@_fake("gather_rows_backward")
def _(grad: Tensor, unit: Tensor, counts: Tensor, num_units: int) -> Tensor:
    return grad.new_empty(num_units, grad.shape[1])


@_fake("grouped_linear")
def _(rows: Tensor, w: Tensor, b: Tensor | None, counts: Tensor, slot: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], w.shape[1])


@_fake("grouped_linear_backward")
def _(
    grad: Tensor, rows: Tensor, w: Tensor, counts: Tensor, slot: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    d_rows, d_w, d_b = _asked(rows, [rows.shape, w.shape, w.shape[:2]], needs, [rows.dtype] * 3)
    if needs[1] and is_transposed(w):
        d_w = torch.empty_like(w.mT, dtype=rows.dtype).mT
    return d_rows, d_w, d_b


@_fake("scatter_combine")
def _(
    rows: Tensor, unit: Tensor, weight: Tensor | None, counts: Tensor, num_units: int, dtype: torch.dtype
) -> Tensor:
    return rows.new_empty((num_units, rows.shape[1]), dtype=dtype)


@_fake("scatter_combine_backward")
def _(
    grad: Tensor, rows: Tensor, unit: Tensor, weight: Tensor | None, counts: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    w_dtype = rows.dtype if weight is None else weight.dtype
    return _asked(rows, [rows.shape, unit.shape], needs, [rows.dtype, w_dtype])


@_fake("grouped_mlp")
def _(
    x: Tensor,
    unit: Tensor,
    weight: Tensor | None,
    counts: Tensor,
    slot: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    save: bool,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    rows, inner = unit.shape[0] + slack(x.dtype) if save else 0, w1.shape[1:-1].numel()
    return x.new_empty(x.shape[0], w2.shape[1]), x.new_empty(rows, inner)


@_fake("grouped_mlp_packed")
def _(
    x: Tensor,
    unit: Tensor,
    weight: Tensor | None,
    counts: Tensor,
    slot: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden_dim: int,
    output_dim: int,
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape[0], output_dim)


@_fake("grouped_mlp_pre")
def _(x: Tensor, unit: Tensor, counts: Tensor, slot: Tensor | None, w1: Tensor, b1: Tensor | None) -> Tensor:
    return x.new_empty(unit.shape[0] + slack(x.dtype), w1.shape[1:-1].numel())


@_fake("grouped_mlp_backward")
def _(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    unit: Tensor,
    weight: Tensor | None,
    counts: Tensor,
    slot: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    shapes = [x.shape, unit.shape, w1.shape, w1.shape[:-1], w2.shape, w2.shape[:2]]
    w_dtype = x.dtype if weight is None else weight.dtype
    return _asked(x, shapes, needs, [x.dtype, w_dtype, *[x.dtype] * 4])


# Autograd -----------------------------------------------------------------------------------------------


# (backward, setup) of each operator that has a derivative.
RULES: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {}


def _register_autograd(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    torch.library.register_autograd(f"flexpert::{name}", backward, setup_context=setup, lib=LIBRARY)
    RULES[name] = backward, setup


def _twin(name: str, *args: Any) -> Any:
    """The kernel of a backward pass: directly where nobody watches, or differentiates it."""
    if not torch.is_grad_enabled() and is_unwatched(args):
        return select.kernel(name, "cpu", args[0].dtype)(*args)
    return getattr(OPERATORS, name)(*args)


def _refuse_twice(name: str, *twins: str) -> None:
    """Refuse a derivative of what an operator's backward calls: `<name>_backward` and other twins."""

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise FlexpertError(
            f"flexpert::{name} cannot be differentiated twice; for second derivatives run the model inside"
            " flexpert.ops.use_backend('reference')"
        )

    for twin in (f"{name}_backward", *twins):
        _register_autograd(twin, refuse, lambda ctx, inputs, output: None)


for _name in ("gather_rows", "grouped_linear", "scatter_combine"):
    _refuse_twice(_name)
_refuse_twice("grouped_mlp", "grouped_mlp_pre")


def _refuse_packed(ctx: Any, *grads: Tensor) -> Any:
    raise FlexpertError(
        "there is no backward pass through packed weights; call unpack() on the bank, or"
        " flexpert.unpack(model), before training"
    )


_register_autograd("grouped_mlp_packed", _refuse_packed, lambda ctx, inputs, output: None)


def _given(gradients: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, unit, counts = inputs
    ctx.save_for_backward(unit, counts)
    ctx.num_units = x.shape[0]


def _backward_gather(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    unit, counts = ctx.saved_tensors
    return _twin("gather_rows_backward", grad, unit, counts, ctx.num_units), None, None


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, w, _, counts, slot = inputs
    ctx.save_for_backward(rows, w, counts, slot)


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = _twin("grouped_linear_backward", grad, *ctx.saved_tensors, needs)
    return *_given(gradients, needs), None, None


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward_combine(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    gradients = _twin("scatter_combine_backward", grad, *ctx.saved_tensors, needs)
    d_rows, d_weight = _given(gradients, needs)
    return d_rows, None, d_weight, None, None, None


def _setup_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, unit, weight, counts, slot, w1, b1, w2, b2, activation, save, recompute = inputs
    if not save and not recompute:
        raise FlexpertError(
            "flexpert::grouped_mlp needs save=True or recompute=True where a gradient is wanted"
        )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    kept = (output[1], None) if save else (None, b1)  # the pre-activation, or what it is computed from
    ctx.save_for_backward(*kept, x, unit, weight, counts, slot, w1, w2, b2)
    ctx.activation = activation
    ctx.kernel = wanted_kernel()  # what it keeps is its own: backward takes the same one


def _backward_mlp(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    pre, b1, x, unit, weight, counts, slot, w1, w2, b2 = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = [need[0], need[2], need[5], need[6], need[7], need[8]]
    with wanting(ctx.kernel):
        if pre is None:
            pre = _twin("grouped_mlp_pre", x, unit, counts, slot, w1, b1)
        gradients = _twin(
            "grouped_mlp_backward",
            grad, pre, x, unit, weight, counts, slot, w1, w2, b2, ctx.activation, needs,
        )  # fmt: skip
    d_x, d_weight, d_w1, d_b1, d_w2, d_b2 = _given(gradients, needs)
    return d_x, None, d_weight, None, None, d_w1, d_b1, d_w2, d_b2, None, None, None


_register_autograd("gather_rows", _backward_gather, _setup_gather)
_register_autograd("grouped_linear", _backward_linear, _setup_linear)
_register_autograd("scatter_combine", _backward_combine, _setup_combine)
_register_autograd("grouped_mlp", _backward_mlp, _setup_mlp)
