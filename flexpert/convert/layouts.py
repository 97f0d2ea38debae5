"""Find the MLPs of any model and read their weights, by what their modules are and compute.

An MLP is recognised by its parts (two or three linear modules whose widths fit, nothing else with
parameters) and accepted only if the formula with these weights gives what the module gives, in fp64. So no
list of classes is needed: Llama, Qwen, Mistral, Phi, GPT-2, ViT, BERT, Swin, `nn.Sequential` and their kin.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from flexpert.core.errors import ConfigError
from flexpert.experts import ExpertBank, SharedExpert
from flexpert.layer import MoE

from .dense import DenseMLP
from .reading import Place, UnknownError, describe, has_parts, is_split, read_mlp, shorten

Choice = str | Sequence[str] | Callable[[str, nn.Module], bool]
KNOWN = (
    "two linear modules with an activation between (nn.Sequential, ViT, GPT-2 and others), three of a gated "
    "unit (Llama, Qwen and others), gate and up in one (Phi-3), or modules 'intermediate' and 'output' side "
    "by side (BERT, Swinv2 and others)"
)


def find_mlps(model: nn.Module) -> dict[str, tuple[Place, DenseMLP]]:
    """Every MLP of a model by name, in order, with its weights (not copied)."""
    return _read_all(model, lambda *_: True)[0]


def choose_mlps(model: nn.Module, layers: Choice) -> dict[str, tuple[Place, DenseMLP]]:
    """The MLPs that a glob, several of them, or a predicate (name, module) -> bool names.

    A `*` stands for dots too. An MLP of two modules side by side goes by the name of the first,
    `...intermediate`.

    Raises:
        ConfigError: the predicate or one of the globs names nothing, or nothing that is a known MLP; or an
            MLP shares its weights with another.
    """
    found, unknown = _read_all(model, matcher(layers))
    for part in [layers] if isinstance(layers, str) or callable(layers) else layers:
        fits = matcher(part)
        if not any(fits(name, model.get_submodule(name)) for name in found):
            modules = [
                (name, module) for name, module in model.named_modules() if name and fits(name, module)
            ]
            matched = [unknown.get(name, f"{name} ({describe(module)})") for name, module in modules]
            raise ConfigError(_nothing(model, part, matched))
    for place, _ in found.values():
        _refuse_shared(model, place)
    return found


def _refuse_shared(model: nn.Module, place: Place) -> None:
    """Raise `ConfigError` where others use the MLP's parameters too: experts would part what is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path in (*place.first, place.last):
        for parameter in model.get_submodule(path).parameters():
            if len(same := names[id(parameter)]) > 1:
                raise ConfigError(
                    f"{same[0]} and {same[1]} are one parameter, which a conversion would part; give each "
                    f"module weights of its own first"
                )


def _read_all(
    model: nn.Module, chosen: Callable[[str, nn.Module], bool]
) -> tuple[dict[str, tuple[Place, DenseMLP]], dict[str, str]]:
    """The chosen MLPs by name, and by name why others that have the parts of one are none."""
    found, unknown = {}, {}
    for name, module in _candidates(model):
        if chosen(name, module):
            try:
                found[name] = read_mlp(name, module, model)
            except UnknownError as reason:
                unknown[name] = f"{name} ({reason})"
    return found, unknown


def matcher(layers: Choice) -> Callable[[str, nn.Module], bool]:
    """The predicate of a choice."""
    if callable(layers):
        return layers
    globs = [layers] if isinstance(layers, str) else list(layers)
    return lambda name, _: any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _nothing(model: nn.Module, layers: Choice, matched: Sequence[str]) -> str:
    named = "the predicate" if callable(layers) else f"{layers!r}"
    there = [f"{name} ({_sizes(mlp)})" for name, (_, mlp) in find_mlps(model).items()]
    inside = f"MLPs found in this {type(model).__name__}: {shorten(there) or 'none'}"
    if not matched:
        return f"layers={named} matches no module; {inside}"
    return (
        f"layers={named} matches no MLP of a known layout, only {shorten(matched)}; known are {KNOWN}; "
        f"{inside}; name one of these, or write the module as nn.Sequential(nn.Linear, activation, nn.Linear)"
    )


def _sizes(mlp: DenseMLP) -> str:
    kind = "gated" if mlp.gated else "plain"
    return f"{kind} {mlp.model_dim} -> {mlp.hidden_dim} -> {mlp.output_dim}, {mlp.activation}"


def _candidates(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that have the parts of an MLP, outermost first; nothing inside of MoE layers."""
    for name, module in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, (MoE, ExpertBank, SharedExpert)):
            continue
        if (is_split(model) and name == "intermediate") or has_parts(module):
            yield path, module
        else:
            yield from _candidates(module, f"{path}.")
