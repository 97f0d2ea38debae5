"""Dense to MoE: put MoE layers in the place of a model's MLPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.config import MoEConfig
from flexpert.core.errors import ConfigError, FlexpertError
from flexpert.core.registry import check_options, split_spec
from flexpert.core.seeding import derive_seed
from flexpert.layer import MoE
from flexpert.losses import build_losses
from flexpert.routers import build_router

from .calibration import neuron_importance
from .dense import DenseMLP, stack
from .layouts import Choice, choose_mlps
from .methods import Method, Parts
from .report import ConversionReport, LayerReport, Sizes, measure_layer, measure_model, rounding
from .structure import Layer, Structure, get_structure, install, set_structure

_SETTINGS = ("capacity_factor", "batch_prioritized", "losses", "router")


def convert(
    model: nn.Module,
    layers: Choice,
    method: Method,
    *,
    calibration: Iterable[Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> ConversionReport:
    """Turn MLPs of a dense model into MoE layers, in place.

    The model's own forward stays as it is. Its config gets an entry `flexpert`, with which `load` builds the
    model again. Nothing is changed when an error is raised.

    Args:
        model: any model.
        layers: which MLPs: a glob over module names ("model.layers.*.mlp"; a `*` stands for dots too),
            several of them, or a predicate (name, module) -> bool.
        method: how; see `flexpert.convert.methods`.
        calibration: batches for methods that look at activations; see `neuron_importance`.
        settings: of `MoEConfig`, in place of the method's: capacity_factor, batch_prioritized, losses; and
            `router`, options of the router such as {"selection_bias": True}. A capacity that drops tokens
            ends the exact start.
        seed: of the random numbers.

    Returns:
        What was changed, in numbers.

    Raises:
        ConfigError: no MLP is named, its layout is unknown, or sizes do not divide.
    """
    check_options("settings", settings or {}, _SETTINGS)
    found = choose_mlps(model, layers)
    plans = {
        name: Layer(
            place=place,
            moe=_layer(name, mlp, method, settings or {}),
            method=method.name,
            pieces=method.pieces,
        )
        for name, (place, mlp) in found.items()
    }
    importance = _importance(model, plans, method, calibration)
    before = measure_model(model)
    why_not = _why_not_exact(method, plans)
    built: dict[str, MoE] = {}
    reports: dict[str, LayerReport] = {}
    for name, (_, mlp) in found.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        moe = _build(plans[name].moe, mlp, method, generator, importance.get(name))
        difference = compare(mlp, moe)
        if why_not is None and not difference <= rounding(mlp.w1.dtype):
            raise ConfigError(f"{name}: the converted layer is off by {difference:.1e}; please report this")
        built[name] = moe
        reports[name] = LayerReport(
            kind=describe_layer(plans[name].moe),
            before=Sizes(params=mlp.num_params(), active_params=mlp.num_params(), flops=mlp.flops()),
            after=measure_layer(moe),
            difference=difference,
        )
    for name, moe in built.items():
        install(model, plans[name], moe)
    after = update_structure(model, {**get_structure(model).layers, **plans})
    return ConversionReport(
        method=method.name, why_not_exact=why_not, before=before, after=after, layers=reports
    )


def update_structure(model: nn.Module, layers: Mapping[str, Layer]) -> Sizes:
    """Write what is converted now into the model's config; the model's sizes."""
    sizes = measure_model(model)
    numbers = {"num_params": sizes.params, "num_active_params": sizes.active_params}
    set_structure(model, Structure(layers=layers, sizes=numbers))
    return sizes


@torch.no_grad()
def compare(old: DenseMLP | MoE, new: MoE, tokens: int = 16) -> float:
    """Largest difference of a layer's outputs for random tokens from another's, relative to the largest."""
    width = new.experts.model_dim
    x_TD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(next(new.parameters()))
    was_training = [(layer, layer.training) for layer in (old, new) if isinstance(layer, MoE)]
    for layer, _ in was_training:
        layer.eval()
    want, got = old(x_TD).double(), new(x_TD).double()
    for layer, training in was_training:
        layer.train(training)
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def build_layer(config: MoEConfig, tensors: Mapping[str, Tensor], seed: int) -> MoE:
    """A layer that takes these tensors for its experts, and has a new router of their dtype and device.

    The global random generator is left as it was.
    """
    like = tensors["experts.w1"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            layer = MoE(config)
        layer.router = build_router(config).to(like.device, like.dtype)
    router = {f"router.{name}": tensor for name, tensor in layer.router.state_dict(keep_vars=True).items()}
    layer.load_state_dict({**router, **tensors}, assign=True)
    return layer


def _build(
    config: MoEConfig, mlp: DenseMLP, method: Method, generator: torch.Generator, importance: Tensor | None
) -> MoE:
    parts = method.parts(mlp, generator, importance)
    layer = build_layer(config, _tensors(parts), generator.initial_seed())
    weight = getattr(layer.router, "weight", None)
    if isinstance(weight, nn.Parameter):
        num_experts, width = weight.shape
        with torch.no_grad():
            weight.copy_(method.rows(num_experts, width, generator))
    elif method.pieces > 1:
        raise ConfigError(
            f"method {method.name!r} sets the rows of the router, and {config.router!r} has none; use a "
            f"linear or cosine router"
        )
    return layer


def _tensors(parts: Parts) -> dict[str, Tensor]:
    tensors = {f"experts.{name}": tensor for name, tensor in stack(parts.experts).items()}
    if parts.shared is not None:
        tensors |= {f"shared.expert.{name}": tensor for name, tensor in stack([parts.shared]).items()}
    return tensors


def _layer(name: str, mlp: DenseMLP, method: Method, settings: Mapping[str, Any]) -> MoEConfig:
    """The configuration of the layer that an MLP becomes."""
    try:
        config = method.layer(mlp)
        settings = dict(settings)
        if options := settings.pop("router", None):
            router, own = split_spec(config.router, "router")
            settings["router"] = {"name": router, **own, **options}
        config = dataclasses.replace(config, **settings)
        build_losses(config)
        config.num_params()  # refuses options that no part has
    except FlexpertError as error:
        raise ConfigError(f"{name}: {error}") from error
    return config


def _importance(
    model: nn.Module, plans: Mapping[str, Layer], method: Method, calibration: Iterable[Any] | None
) -> dict[str, Tensor]:
    if not method.needs_calibration:
        return {}
    if calibration is None:
        raise ConfigError(
            f"method {method.name!r} ranks neurons by their activity: give calibration=, a few batches of "
            f"data that the model is for"
        )
    return neuron_importance(model, [plan.place for plan in plans.values()], calibration)


def _why_not_exact(method: Method, plans: Mapping[str, Layer]) -> str | None:
    factors = {plan.moe.capacity_factor for plan in plans.values()} - {None, 0.0}
    return f"capacity_factor={factors.pop()} may drop tokens" if factors else method.why_not_exact


def describe_layer(config: MoEConfig) -> str:
    """The kind of a layer in a few words."""
    shared = f" + {config.num_shared_experts} shared" if config.num_shared_experts else ""
    shared += f" of {config.shared_hidden_dim}" if config.shared_hidden_dim else ""
    return f"{config.num_experts} experts of {config.hidden_dim}, top-{config.top_k}{shared}"
