"""More experts, or fewer, in layers that the model's own config describes: one number of experts for all.

Such are the mixture-of-experts models of transformers whose experts are stacked tensors, and those of
`flexpert.models`. The model of another number is built from a changed config, without memory for its weights,
and takes the old tensors, cut or repeated where shapes differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.errors import ConfigError
from flexpert.core.seeding import derive_seed
from flexpert.layer import MoE

from .bank import add_noise
from .conversion import compare
from .layouts import Choice, matcher
from .report import ConversionReport, LayerReport, Sizes, measure_layer, measure_model, same_outputs
from .structure import get_structure, has_config

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOICES = ("num_experts_per_tok", "moe_topk", "top_k")
Sources = Callable[[str, int], list[int]]  # of a layer's name and its experts: which ones it has afterwards


def described_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of routed experts that a model's own config describes, by name; none in a converted one."""
    if not has_config(model) or get_structure(model).layers or _field(model.config, COUNTS) is None:
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if "experts" in module._modules and module._modules.keys() & {"gate", "router"}
    }


def resize_described(
    model: Any, layers: Choice, sources: Sources, *, top_k: int | None, noise: float, seed: int, method: str
) -> ConversionReport:
    """Give all layers other experts, in place; the parts of the model are new modules afterwards.

    Args:
        model: with `described_layers`.
        layers: must name all of them.
        sources: the experts of each layer, equally many in all.
        top_k: K afterwards; None: as it is, or as many as are left.
        noise, seed: on the router's rows of copies; see `grow`.
        method: its name.

    Raises:
        ConfigError: some layers are left out, or tensors are not stacked by expert.
    """
    old = described_layers(model)
    chosen = matcher(layers)
    if left := [name for name, layer in old.items() if not chosen(name, layer)]:
        raise ConfigError(
            f"layers={layers!r} leaves out {left[0]}; the config of {type(model).__name__} has one number of "
            f"experts for all layers, so name them all: '*'"
        )
    count = _get(model.config, COUNTS)
    index = {name: sources(name, count) for name in old}
    config = copy.deepcopy(model.config)
    experts = len(next(iter(index.values())))
    _set(config, COUNTS, experts)
    _set(config, CHOICES, min(_get(config, CHOICES), experts) if top_k is None else top_k)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        new = type(model)(config)
    tensors = _tensors(model, new, index)
    for name, tensor in tensors.items():
        layer = next((layer for layer in index if name.startswith(f"{layer}.")), None)
        if layer is not None and tensor.dim() == 2 and len(tensor) == experts and ".experts." not in name:
            rows = add_noise(tensor.detach(), index[layer], 1, noise, derive_seed(seed, name))
            tensors[name] = nn.Parameter(rows, requires_grad=tensor.requires_grad)
    new.load_state_dict(tensors, assign=True)
    _copy_buffers(model, new)
    new.train(model.training)
    reports = {name: _report(old[name], new.get_submodule(name), model.config, config) for name in old}
    before, after = _sizes_of_model(model), _sizes_of_model(new)
    kept = {name: vars(model)[name] for name in ("generation_config",) if name in vars(model)}
    vars(model).update({**vars(new), **kept})
    return ConversionReport(
        method=method,
        why_not_exact=same_outputs(reports, model),
        before=before,
        after=after,
        layers=reports,
    )


def _tensors(model: nn.Module, new: nn.Module, index: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The new model's tensors: the old ones, those with a place for each expert by their index."""
    state, wanted = model.state_dict(keep_vars=True), new.state_dict()
    if odd := sorted(state.keys() ^ wanted.keys()):
        raise ConfigError(
            f"{type(model).__name__} keeps every expert as modules of its own ({odd[0]}); only experts in "
            f"stacked tensors can be cut and copied"
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensors[name] = tensor
        if (shape := wanted[name].shape) == tensor.shape:
            continue
        layer = next((layer for layer in index if name.startswith(f"{layer}.")), None)
        places = [i for i, (a, b) in enumerate(zip(tensor.shape, shape, strict=True)) if a != b]
        if layer is None or len(places) != 1 or shape[places[0]] != len(index[layer]):
            raise ConfigError(
                f"{name} has the shape {tuple(tensor.shape)}, and {tuple(shape)} with another number of "
                f"experts; only tensors with one place for each expert can be cut and copied"
            )
        rows = torch.tensor(index[layer], device=tensor.device)
        cut = tensor.detach().index_select(places[0], rows)
        is_parameter = isinstance(tensor, nn.Parameter)
        tensors[name] = nn.Parameter(cut, requires_grad=tensor.requires_grad) if is_parameter else cut
    return tensors


def _copy_buffers(model: nn.Module, new: nn.Module) -> None:
    """Those that are in no state dict, such as rotary frequencies."""
    for name, buffer in model.named_buffers():
        owner, _, own = name.rpartition(".")
        if new.get_buffer(name).is_meta:
            new.get_submodule(owner)._buffers[own] = buffer


def _report(old: Any, new: Any, before: Any, after: Any) -> LayerReport:
    numbers = [(_get(config, COUNTS), _get(config, CHOICES)) for config in (before, after)]
    kinds = [f"{experts} experts, top-{top_k}" for experts, top_k in numbers]
    return LayerReport(
        kind=" -> ".join(kinds),
        before=_sizes(old, *numbers[0]),
        after=_sizes(new, *numbers[1]),
        difference=compare(old, new) if isinstance(old, MoE) else _difference(old, new, after),
    )


@torch.no_grad()
def _difference(old: nn.Module, new: nn.Module, config: Any) -> float:
    """As `compare`, of blocks of transformers."""
    width = config.get_text_config().hidden_size
    x = torch.randn(1, 16, width, generator=torch.Generator().manual_seed(0)).to(next(new.parameters()))
    outputs = []
    for block in (old, new):
        training = block.training
        y = block.eval()(x)
        block.train(training)
        outputs.append((y[0] if isinstance(y, tuple) else y).double())
    want, got = outputs
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def _sizes(layer: Any, experts: int, top_k: int) -> Sizes:
    if isinstance(layer, MoE):
        return measure_layer(layer)
    params = sum(p.numel() for p in layer.parameters())
    routed = sum(p.numel() for p in layer.experts.parameters())
    active = params - routed + routed * top_k // experts
    return Sizes(params=params, active_params=active, flops=2 * active)


def _sizes_of_model(model: Any) -> Sizes:
    sizes, config = measure_model(model), model.config
    experts, top_k = _get(config, COUNTS), _get(config, CHOICES)
    active, flops = sizes.active_params, sizes.flops
    for layer in described_layers(model).values():
        if not isinstance(layer, MoE):
            routed = sum(p.numel() for p in layer.experts.parameters())
            active -= routed - routed * top_k // experts
            flops += 2 * (routed * top_k // experts)
    return Sizes(params=sizes.params, active_params=active, flops=flops)


def _field(config: Any, names: tuple[str, ...]) -> str | None:
    text = config.get_text_config()
    return next((name for name in names if isinstance(getattr(text, name, None), int)), None)


def _get(config: Any, names: tuple[str, ...]) -> int:
    """The number in a config; 1 where it has none, as where a token always has one expert."""
    name = _field(config, names)
    return 1 if name is None else int(getattr(config.get_text_config(), name))


def _set(config: Any, names: tuple[str, ...], value: int) -> None:
    if (name := _field(config, names)) is not None:
        setattr(config.get_text_config(), name, value)
    elif value != 1:
        kind = type(config).__name__
        raise ConfigError(f"top_k={value}: {kind} has none of {', '.join(names)}; leave it out")
