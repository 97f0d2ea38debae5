"""More experts, or fewer, in layers that are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from flexpert.core.config import MoEConfig, require_number
from flexpert.core.errors import ConfigError, FlexpertError
from flexpert.core.registry import split_spec
from flexpert.core.seeding import derive_seed
from flexpert.layer import MoE
from flexpert.routers import CosineRouter, LinearRouter

from .bank import Stats, add_noise, load_of, read_bank
from .conversion import build_layer, compare, describe_layer, update_structure
from .described import described_layers, resize_described
from .layouts import Choice
from .methods import METHODS
from .report import ConversionReport, LayerReport, measure_layer, measure_model, same_outputs
from .structure import Layer, get_structure, moe_layers

_ROWS = ("weight", "noise_weight", "selection_bias")  # of a router, a row for each expert


def grow(
    model: nn.Module,
    layers: Choice,
    num_experts: int,
    *,
    top_k: int | None = None,
    stats: Stats | None = None,
    noise: float = 0.1,
    seed: int = 0,
) -> ConversionReport:
    """Give MoE layers more experts: copies of those they have, in place.

    The outputs stay as they are with K = 1 and the weight 1 (as of `Clone`), and with noise=0 when E and K
    grow by the same factor under renormalised weights. Otherwise the report has the difference.

    Args:
        model: a converted model, one without a config of its own, or one whose config has the number of
            experts and whose experts are stacked tensors (Mixtral, Qwen3-MoE, `flexpert.models`).
        layers: which layers; see `to_dense`. "*" where the config has one number for all.
        num_experts: E afterwards.
        top_k: K afterwards; None for as it is.
        stats: copy the most used first, such as `routing_scope(model).stats`; None: in order.
        noise: of the new router rows, as a share of the standard deviation of the router's weights. With 0
            and K = 1 a copy would never be chosen, nor learn.
        seed: of the noise.

    Raises:
        ConfigError: no layer is named, E does not become larger, or all experts are slices of one MLP.
    """
    require_number("noise", noise, least=0)
    if described_layers(model):

        def copies(name: str, old: int) -> list[int]:
            if num_experts <= old:
                raise ConfigError(f"num_experts={num_experts}: {name} has {old}; expected more")
            load = load_of(name, old, stats) if stats is not None else [0.0] * old
            order = sorted(range(old), key=lambda expert: -load[expert])
            return [*range(old), *(order[i % old] for i in range(num_experts - old))]

        return resize_described(model, layers, copies, top_k=top_k, noise=noise, seed=seed, method="grow")

    def sources(name: str, layer: Layer, moe: MoE) -> tuple[list[int], int]:
        size, old = layer.pieces, moe.experts.num_experts
        if layer.method in METHODS and METHODS[layer.method].one_copy:
            raise ConfigError(
                f"{name}: the experts are slices of one MLP, and copies of a slice would be added twice; "
                f"convert the dense model by Granular for several copies"
            )
        if num_experts <= old or num_experts % size:
            raise ConfigError(
                f"num_experts={num_experts}: {name} has {describe_layer(layer.moe)}; expected more"
                f"{f', and a multiple of the {size} pieces of a copy' if size > 1 else ''}"
            )
        order = list(range(old // size))
        if stats is not None:
            load = load_of(name, old, stats)
            order.sort(key=lambda unit: -sum(load[unit * size : (unit + 1) * size]))
        units = [*range(old // size), *(order[i % len(order)] for i in range((num_experts - old) // size))]
        return [unit * size + piece for unit in units for piece in range(size)], layer.pieces

    return _resize(model, layers, sources, top_k, noise, seed, "grow")


def extract(
    model: nn.Module,
    layers: Choice,
    experts: Sequence[int] | int,
    *,
    top_k: int | None = None,
    stats: Stats | None = None,
) -> ConversionReport:
    """Keep some experts of MoE layers and drop the others, in place.

    Args:
        model: a converted model, one without a config of its own, or one whose config has the number of
            experts and whose experts are stacked tensors (Mixtral, Qwen3-MoE, `flexpert.models`).
        layers: which layers; see `to_dense`. "*" where the config has one number for all.
        experts: their indices, or how many of the most used by `stats` to keep (in the order they have).
        top_k: K afterwards; None for as it is, or as many as are left.
        stats: for a number of experts, such as `routing_scope(model).stats`.

    Raises:
        ConfigError: no layer is named, an index there is not, or a part of a copy.
    """

    def choose(name: str, count: int) -> list[int]:
        chosen = _most_used(name, count, experts, stats) if isinstance(experts, int) else list(experts)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(count)):
            raise ConfigError(f"experts={experts!r}: expected different indices in 0..{count - 1} of {name}")
        return chosen

    def sources(name: str, layer: Layer, moe: MoE) -> tuple[list[int], int]:
        chosen = choose(name, moe.experts.num_experts)
        size = layer.pieces
        if layer.method in METHODS and METHODS[layer.method].one_copy:
            return chosen, len(chosen)
        units = chosen[::size]
        if chosen != [unit // size * size + piece for unit in units for piece in range(size)]:
            raise ConfigError(f"experts={chosen}: {name} has copies of {size} pieces each; keep whole copies")
        return chosen, size

    if described_layers(model):
        return resize_described(model, layers, choose, top_k=top_k, noise=0.0, seed=0, method="extract")
    return _resize(model, layers, sources, top_k, 0.0, 0, "extract")


def _most_used(name: str, count: int, keep: int, stats: Stats | None) -> list[int]:
    if not 1 <= keep <= count:
        raise ConfigError(f"experts={keep}: expected 1..{count}, the experts of {name}")
    load = load_of(name, count, stats)
    return sorted(sorted(range(count), key=lambda expert: -load[expert])[:keep])


def _resize(
    model: nn.Module,
    layers: Choice,
    sources: Callable[[str, Layer, MoE], tuple[list[int], int]],
    top_k: int | None,
    noise: float,
    seed: int,
    method: str,
) -> ConversionReport:
    before = measure_model(model)
    named = moe_layers(model, layers)
    changed: dict[str, tuple[Layer, MoE]] = {}
    reports: dict[str, LayerReport] = {}
    for name, (layer, moe) in named.items():
        index, pieces = sources(name, layer, moe)
        k = min(layer.moe.top_k, len(index)) if top_k is None else top_k
        try:
            config = _resized(layer.moe, len(index), k)
            new = _rebuild(name, moe, config, index)
            _set_router(new, moe, index, pieces, noise, derive_seed(seed, name))
        except FlexpertError as error:
            raise ConfigError(f"{name}: {error}") from error
        changed[name] = dataclasses.replace(layer, moe=config, pieces=pieces), new
        reports[name] = LayerReport(
            kind=f"{describe_layer(layer.moe)} -> {describe_layer(config)}",
            before=measure_layer(moe),
            after=measure_layer(new),
            difference=compare(moe, new),
        )
    for name, (_, new) in changed.items():
        _take_over(named[name][1], new)
    known = get_structure(model).layers
    update = {layer.place.name: layer for layer, _ in changed.values() if layer.place.name in known}
    return ConversionReport(
        method=method,
        why_not_exact=same_outputs(reports, model),
        before=before,
        after=update_structure(model, {**known, **update}),
        layers=reports,
    )


def _resized(config: MoEConfig, num_experts: int, top_k: int) -> MoEConfig:
    """Of another E and K; straight-through weights, which are constant, keep their sum."""
    name, options = split_spec(config.router, "router")
    if options.get("straight_through") and top_k != config.top_k:
        options["scale"] = options.get("scale", 1.0) * config.top_k / top_k
        config = dataclasses.replace(config, top_k=1, router={"name": name, **options})
    return dataclasses.replace(config, num_experts=num_experts, top_k=top_k)


def _rebuild(name: str, moe: MoE, config: MoEConfig, index: list[int]) -> MoE:
    """A layer with these experts of another."""
    read_bank(moe.experts, name)  # refuses other kinds
    if type(moe.router) not in (LinearRouter, CosineRouter):
        raise ConfigError(f"the router is a {type(moe.router).__name__}; expected a linear or cosine one")
    state = {n: t for n, t in moe.state_dict().items() if not n.startswith("router.")}
    rows = torch.tensor(index, device=state["experts.w1"].device)
    tensors = {
        n: t.index_select(0, rows) if n.startswith("experts.") else t.clone() for n, t in state.items()
    }
    return build_layer(config, tensors, seed=0).train(moe.training)


def _set_router(new: MoE, moe: MoE, index: list[int], pieces: int, noise: float, seed: int) -> None:
    """Give a layer the router of another, a row for each of its experts."""
    state = moe.router.state_dict()
    rows = torch.tensor(index, device=state["weight"].device)
    state |= {name: tensor.index_select(0, rows) for name, tensor in state.items() if name in _ROWS}
    state["weight"] = add_noise(state["weight"], index, pieces, noise, seed)
    new.router.load_state_dict(state)


def _take_over(moe: MoE, new: MoE) -> None:
    """Give a layer the parts of another; it stays the same module for whoever holds it."""
    moe.router, moe.experts, moe.shared, moe.config = new.router, new.experts, new.shared, new.config
