"""What a conversion changed, in numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexpert.experts import SharedExpert
from flexpert.layer import MoE

from .dense import is_linear, linear_shape


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a layer or a model.

    Attributes:
        params: parameters; one that several modules share counts once.
        active_params: those that a token meets: not the experts beyond the K largest.
        flops: floating-point operations per token of the products with weights, 2 per weight. Of a model:
            each of its matrices once, so it leaves out attention's products of tokens with tokens.
    """

    params: int
    active_params: int
    flops: int


def measure_model(model: nn.Module) -> Sizes:
    """The sizes of a model, converted or not."""
    params = sum(p.numel() for p in model.parameters())
    idle = sum(_size(m) - m.num_active_params() for m in model.modules() if isinstance(m, MoE))
    return Sizes(params=params, active_params=params - idle, flops=_flops(model))


def measure_layer(layer: MoE | SharedExpert) -> Sizes:
    """The sizes of a layer."""
    active = layer.num_active_params() if isinstance(layer, MoE) else _size(layer)
    return Sizes(params=_size(layer), active_params=active, flops=layer.flops_per_token())


def _flops(module: nn.Module) -> int:
    if isinstance(module, (MoE, SharedExpert)):
        return module.flops_per_token()
    own = 2 * math.prod(linear_shape(module)) if is_linear(module) else 0
    return own + sum(_flops(child) for child in module.children())


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def rounding(dtype: torch.dtype) -> float:
    """Up to which difference, relative to the largest output, layers of a dtype compute the same."""
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One converted layer.

    Attributes:
        kind: what it is now, in words.
        before, after: its sizes.
        difference: of its outputs for random tokens from what they were, relative to the largest.
    """

    kind: str
    before: Sizes
    after: Sizes
    difference: float


def same_outputs(reports: Mapping[str, LayerReport], model: nn.Module) -> str | None:
    """None where all differences are rounding; else what is to be said."""
    worst = max(report.difference for report in reports.values())
    if worst <= rounding(next(model.parameters()).dtype):
        return None
    return f"a layer's outputs differ by {worst:.1e} of the largest"


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did; `print` it, or write `to_dict()` as JSON.

    Attributes:
        method: its name.
        why_not_exact: None where the model computes what it did before; else why it does not.
        before, after: sizes of the whole model.
        layers: by name.
    """

    method: str
    why_not_exact: str | None
    before: Sizes
    after: Sizes
    layers: Mapping[str, LayerReport]

    @property
    def exact(self) -> bool:
        """Whether the model computes what it did before, up to rounding."""
        return self.why_not_exact is None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, `exact` included."""
        return {**dataclasses.asdict(self), "exact": self.exact}

    def __str__(self) -> str:
        return describe(self.to_dict())


def describe(report: Mapping[str, Any]) -> str:
    """The text of a report's plain data."""
    layers = report["layers"]
    start = "the same outputs as before" if report["exact"] else f"other outputs: {report['why_not_exact']}"
    lines = [f"{report['method']}: {len(layers)} layers; {start}", "", _HEAD]
    lines += [_line("whole model", report["before"], report["after"], None)]
    lines += [
        _line(f"{name} ({layer['kind']})", layer["before"], layer["after"], layer["difference"])
        for name, layer in layers.items()
    ]
    return "\n".join(lines)


_HEAD = f"{'parameters':>24} {'active':>23} {'FLOPs per token':>23} {'difference':>11}  layer"


def _line(name: str, before: Mapping[str, int], after: Mapping[str, int], difference: float | None) -> str:
    pairs = [f"{_short(before[k])} -> {_short(after[k])}" for k in ("params", "active_params", "flops")]
    error = "" if difference is None else f"{difference:.1e}"
    return f"{pairs[0]:>24} {pairs[1]:>23} {pairs[2]:>23} {error:>11}  {name}"


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)
