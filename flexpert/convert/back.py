"""MoE to dense: one MLP in the place of a layer's experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.errors import ConfigError
from flexpert.experts import SharedExpert
from flexpert.layer import MoE

from .bank import Stats, load_of, read_bank, read_shared
from .conversion import compare, describe_layer, update_structure
from .dense import DenseMLP, average, join, stack, write_linear
from .described import described_layers
from .layouts import Choice
from .report import ConversionReport, LayerReport, Sizes, measure_layer, measure_model, same_outputs
from .structure import Layer, get_structure, has_config, moe_layers, put

WAYS = ("mean", "usage", "keep")


def to_dense(
    model: nn.Module,
    layers: Choice = "*",
    *,
    how: str = "mean",
    stats: Stats | None = None,
    keep: int = 0,
    dense: nn.Module | None = None,
) -> ConversionReport:
    """Turn MoE layers back into dense MLPs, in place.

    Pieces of one copy (`Granular`, `Slice`, `Importance`) are joined; several copies become one by `how`.
    Weights of the router are left out. A converted model becomes one of its dense class again, and its config
    says so.

    Args:
        model: a converted model, or one without a config of its own.
        layers: which layers, by the name of the layer or of the MLP it was; see `convert`.
        how: "mean" of the copies; "usage", their mean weighted by `stats`; "keep" the one of index `keep`.
        stats: for "usage": rows of each expert, such as `routing_scope(model).stats`.
        keep: the copy to keep.
        dense: the dense model that was converted (its weights do not matter); needed for a converted model
            without a config. Without it such a layer becomes a `SharedExpert`.

    Returns:
        What was changed; `exact` where the copies were alike.

    Raises:
        ConfigError: no layer is named, or its experts are no equal MLPs.
        CheckpointError: the experts do not fit the dense model.
    """
    if described := described_layers(model):
        raise ConfigError(
            f"{next(iter(described))} is described by the config of {type(model).__name__}, which has no "
            f"dense form; extract(model, '*', [i], top_k=1) keeps one expert"
        )
    if how not in WAYS:
        raise ConfigError(f"how={how!r}: expected one of {', '.join(WAYS)}")
    named = moe_layers(model, layers)
    mlps = {name: _merge(name, layer, moe, how, stats, keep) for name, (layer, moe) in named.items()}
    before = measure_model(model)
    skeleton = _skeleton(model) if dense is None else copy.deepcopy(dense)
    modules = {name: _modules(skeleton, layer, mlps[name]) for name, (layer, _) in named.items()}
    reports = {}
    for name, (_, moe) in named.items():
        mlp = mlps[name]
        after = Sizes(params=mlp.num_params(), active_params=mlp.num_params(), flops=mlp.flops())
        reports[name] = LayerReport(
            kind=f"dense {mlp.hidden_dim}",
            before=measure_layer(moe),
            after=after,
            difference=compare(mlp, moe),
        )
    for name, (layer, _) in named.items():
        training = model.get_submodule(layer.place.name).training
        for path, module in modules[name].items():
            put(model, path, module.train(training))
    gone = {layer.place.name for layer, _ in named.values()}
    rest = {name: layer for name, layer in get_structure(model).layers.items() if name not in gone}
    return ConversionReport(
        method=f"dense by {how}",
        why_not_exact=same_outputs(reports, model),
        before=before,
        after=update_structure(model, rest),
        layers=reports,
    )


def _merge(name: str, layer: Layer, moe: MoE, how: str, stats: Stats | None, keep: int) -> DenseMLP:
    experts, shared = read_bank(moe.experts, name), read_shared(moe, name)
    size = layer.pieces
    groups = [experts[start : start + size] for start in range(0, len(experts), size)]
    if not 0 <= keep < len(groups):
        raise ConfigError(
            f"keep={keep}: {name} has copies 0..{len(groups) - 1} ({describe_layer(layer.moe)})"
        )
    copies = [join([*([] if shared is None else [shared]), *group]) for group in groups]
    if how == "keep" or len(copies) == 1:
        return copies[keep]
    if how == "mean":
        return average(copies, [1 / len(copies)] * len(copies))
    load = load_of(name, len(experts), stats)
    total = sum(load)
    return average(copies, [sum(load[start : start + size]) / total for start in range(0, len(load), size)])


def _skeleton(model: nn.Module) -> nn.Module | None:
    """The dense model without weights, built from the converted one's config; None where it has none."""
    if not has_config(model):
        return None
    config: Any = copy.deepcopy(model.config)
    del config.flexpert
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(model)(config)


def _modules(skeleton: nn.Module | None, layer: Layer, mlp: DenseMLP) -> dict[str, nn.Module]:
    """Dense modules by the names where they belong, with the weights of an MLP."""
    place = layer.place
    if skeleton is None or not place.first:
        return {place.name: _as_module(mlp)}
    weights: list[tuple[Tensor, Tensor | None]]
    if len(place.first) == 2:
        weights = list(zip(mlp.w1, (None, None) if mlp.b1 is None else mlp.b1, strict=True))
    else:
        weights = [(mlp.w1.flatten(0, -2), None if mlp.b1 is None else mlp.b1.flatten())]
    for path, (weight, bias) in zip(place.first, weights, strict=True):
        write_linear(skeleton.get_submodule(path), weight, bias, path)
    write_linear(skeleton.get_submodule(place.last), mlp.w2, mlp.b2, place.last)
    return {path: skeleton.get_submodule(path) for path in (place.name, *place.identities)}


def _as_module(mlp: DenseMLP) -> SharedExpert:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = SharedExpert(
            count=1,
            gated=mlp.gated,
            gate=False,
            model_dim=mlp.model_dim,
            hidden_dim=mlp.hidden_dim,
            output_dim=mlp.output_dim,
            activation=mlp.activation,
            bias=mlp.expert_bias,
            dropout=mlp.dropout,
        )
    module.load_state_dict({f"expert.{name}": t for name, t in stack([mlp]).items()}, assign=True)
    return module
