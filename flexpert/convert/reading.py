"""Read the weights of one MLP, whatever its class: by the parts it has and by what it computes.

Accepted is what has two or three linear modules whose widths fit and nothing else with parameters, if the
formula with these weights gives what the module gives, in fp64.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.ops.activations import ACTIVATIONS

from .dense import DenseMLP, is_linear, linear_shape, read_linear


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an MLP is in its dense model; all are names of modules.

    Attributes:
        name: the module that makes room for the MoE layer.
        first: the linear module(s) of the hidden layer: one, or gate and up.
        last: the linear module of the output.
        identities: what has nothing left to do, besides `name`.
        dropout: of the output, in training, where the module did that itself.
    """

    name: str
    first: tuple[str, ...]
    last: str
    identities: tuple[str, ...] = ()
    dropout: float = 0.0

    @property
    def layer(self) -> str:
        """The name of the MoE layer that takes the place."""
        return f"{self.name}.0" if self.dropout else self.name


class UnknownError(Exception):
    """Why a module is no MLP known here."""


def shorten(texts: Sequence[str], limit: int = 8) -> str:
    """The first few, and how many more there are."""
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest} more" if rest > 0 else "")


def describe(module: nn.Module) -> str:
    """Its class and those of its parts."""
    children = [f"{name}: {type(child).__name__}" for name, child in module.named_children()]
    return f"{type(module).__name__} of {shorten(children) or 'no modules'}"


def is_split(parent: nn.Module) -> bool:
    """BERT and its kin: the hidden layer and the output layer are modules of their own, one after another."""
    denses = [getattr(getattr(parent, name, None), "dense", None) for name in ("intermediate", "output")]
    return all(isinstance(dense, nn.Module) and is_linear(dense) for dense in denses)


def has_parts(module: nn.Module) -> bool:
    """Whether its own modules could be those of an MLP: linear ones that fit, nothing else that learns."""
    children = list(module.children())
    linears = [child for child in children if is_linear(child)]
    rest = [child for child in children if not is_linear(child)]
    plain = not any(True for child in rest for _ in child.parameters()) and not module._parameters
    return plain and len(linears) in (2, 3) and _chain(linears) is not None


def _chain(linears: Sequence[nn.Module]) -> tuple[list[int], int] | None:
    """Which of two or three linear modules are first (by index), and which is last; None if none can be."""
    shapes = [linear_shape(module) for module in linears]
    if len(shapes) == 2:
        (_, hidden), (into, _) = shapes
        return ([0], 1) if hidden in (into, 2 * into) else None
    for last in (2, 1, 0):  # gate, up, down is the common order
        first = [index for index in range(3) if index != last]
        if shapes[first[0]] == shapes[first[1]] and shapes[first[0]][1] == shapes[last][0]:
            return first, last
    return None


def read_mlp(name: str, module: nn.Module, model: nn.Module) -> tuple[Place, DenseMLP]:
    """The MLP of a candidate.

    Raises:
        UnknownError: it does not compute what an MLP with its weights would.
    """
    if any(p.is_meta for p in module.parameters()):
        raise UnknownError("its weights are on the meta device")
    if not has_parts(module):
        return _read_split(name, module, model.get_submodule(name.rpartition(".")[0]))
    named = [(f"{name}.{child}", part) for child, part in module.named_children() if is_linear(part)]
    chain = _chain([part for _, part in named])
    assert chain is not None
    first, last = chain
    trace = _run(module, linear_shape(named[first[0]][1])[0])
    orders = [first, first[::-1]] if len(first) == 2 else [first]
    for order in orders:
        place = Place(
            name=name,
            first=tuple(named[index][0] for index in order),
            last=named[last][0],
            dropout=trace.dropout_after(named[last][0].rpartition(".")[2]),
        )
        dense = read_place(model, place, "identity")
        if (found := _matching(dense, trace)) is not None:
            dropout = trace.dropout_before(named[last][0].rpartition(".")[2])
            return place, dataclasses.replace(found, dropout=dropout)
    raise UnknownError(f"it has {describe(module)}, and computes something else than an MLP of them")


def _read_split(name: str, module: nn.Module, parent: nn.Module) -> tuple[Place, DenseMLP]:
    path = name.rpartition(".")[0]
    last = f"{path}.output.dense" if path else "output.dense"
    hidden, bias = read_linear(module.get_submodule("dense"))
    weight, output_bias = read_linear(parent.get_submodule("output.dense"))
    if hidden.shape[0] != weight.shape[1]:
        raise UnknownError(f"its widths do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    trace = _run(module, hidden.shape[1])
    eye = torch.eye(len(hidden), dtype=torch.float64)
    found = _matching(DenseMLP(w1=hidden, b1=bias, w2=eye, b2=None, activation="identity"), trace)
    if found is None:
        raise UnknownError(f"it has {describe(module)}, and is no linear module with a known activation")
    place = Place(name=name, first=(f"{name}.dense",), last=last, identities=(last,))
    return place, DenseMLP(w1=hidden, b1=bias, w2=weight, b2=output_bias, activation=found.activation)


def read_place(model: nn.Module, place: Place, activation: str) -> DenseMLP:
    """The weights at a place of a dense model, not copied but for a gate and up that lie apart."""
    first = [read_linear(model.get_submodule(path)) for path in place.first]
    w2, b2 = read_linear(model.get_submodule(place.last))
    if len(first) == 2:
        (gate, gate_bias), (up, up_bias) = first
        w1 = torch.stack([gate, up])
        b1 = None if gate_bias is None or up_bias is None else torch.stack([gate_bias, up_bias])
    else:
        w1, b1 = first[0]
        if w1.shape[0] == 2 * w2.shape[1]:
            w1, b1 = w1.unflatten(0, (2, -1)), None if b1 is None else b1.unflatten(0, (2, -1))
    return DenseMLP(w1=w1, b1=b1, w2=w2, b2=b2, activation=activation)


@dataclass
class _Trace:
    """What a copy of a module computed in fp64, and in which order it called its modules."""

    x: Tensor
    y: Tensor
    calls: list[tuple[str, nn.Module, Tensor]]

    def _end(self, last: str) -> int:
        names = [name for name, _, _ in self.calls]
        return names.index(last) if last in names else 0

    def dropout_before(self, last: str) -> float:
        """The dropout of the hidden layer: several are one, of the share that any of them drops.

        Raises:
            UnknownError: something else is dropped before the output layer, such as the MLP's input.
        """
        end, rate = self._end(last), 0.0
        for _, module, given in self.calls[:end]:
            if isinstance(module, nn.Dropout) and module.p:
                hidden = self.calls[end][2]
                if given.shape != hidden.shape or not torch.equal(given, hidden):
                    raise UnknownError(
                        f"it has dropout {module.p} of something else than its hidden layer, and experts "
                        f"have none; set its p to 0 before converting"
                    )
                rate += module.p - rate * module.p
        return rate

    def dropout_after(self, last: str) -> float:
        """The dropout of the output."""
        after = self.calls[self._end(last) :]
        return max((module.p for _, module, _ in after if isinstance(module, nn.Dropout)), default=0.0)


def _run(module: nn.Module, width: int) -> _Trace:
    twin = copy.deepcopy(module).to("cpu", torch.float64).eval()
    calls: list[tuple[str, nn.Module, Tensor]] = []

    def note(name: str) -> Any:
        return lambda part, given: calls.append((name, part, given[0] if given else torch.empty(0)))

    for name, part in twin.named_children():
        part.register_forward_pre_hook(note(name))
    # Inputs large enough that activations which differ little (gelu and its tanh form) are told apart.
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = next(part for part in twin.children() if is_linear(part))
    x = x * (2 / (x @ read_linear(first)[0].T).std().clamp(min=1e-6))
    try:
        with torch.no_grad():
            y = twin(x)
    except Exception as error:  # whatever a foreign module may raise
        raise UnknownError(f"it cannot be called with tokens: {error}") from error
    if not isinstance(y, Tensor):
        raise UnknownError(f"it returns a {type(y).__name__}")
    return _Trace(x=x, y=y, calls=calls)


def _matching(dense: DenseMLP, trace: _Trace) -> DenseMLP | None:
    """The MLP with the activation under which it gives what the module gave; None if there is none."""
    exact = {name: tensor.to("cpu", torch.float64) for name, tensor in dense.tensors().items()}
    errors = {}
    for name in ACTIVATIONS:
        y = dataclasses.replace(dense.with_tensors(exact), activation=name)(trace.x)
        if y.shape == trace.y.shape:
            errors[name] = float((y - trace.y).abs().max() / trace.y.abs().max().clamp(min=1e-30))
    best = min(errors, key=errors.__getitem__, default=None)
    if best is None or not errors[best] < 1e-5:  # modules may compute in fp32 inside
        return None
    return dataclasses.replace(dense, activation=best)
