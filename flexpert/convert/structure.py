"""What a conversion did to a model, as plain data: kept in its config, and enough to build it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from flexpert.core.config import MoEConfig
from flexpert.core.errors import CheckpointError, ConfigError, FlexpertError
from flexpert.layer import MoE

from .layouts import Choice, matcher
from .reading import Place, shorten

FORMAT = "flexpert-conversion"
VERSION = 1
_ENTRY = "flexpert"  # the name of the entry in the config, or of the attribute of a model that has none


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One converted MLP.

    Attributes:
        place: where it was.
        moe: the layer it became.
        method: by which method.
        pieces: experts that together are one copy of the MLP.
    """

    place: Place
    moe: MoEConfig
    method: str
    pieces: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is its inverse."""
        place = {**dataclasses.asdict(self.place)}
        place |= {name: list(place[name]) for name in ("first", "identities")}
        moe = self.moe.to_dict()
        if moe["shared_hidden_dim"] is None:  # a field younger than the format: older files have no such key
            del moe["shared_hidden_dim"]
        return {"place": place, "moe": moe, "method": self.method, "pieces": self.pieces}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layer:
        """The layer of plain data."""
        place = dict(data["place"])
        place |= {name: tuple(place[name]) for name in ("first", "identities")}
        moe = MoEConfig.from_dict(data["moe"])
        return cls(place=Place(**place), moe=moe, method=data["method"], pieces=data["pieces"])


@dataclass(frozen=True, kw_only=True)
class Structure:
    """All converted layers of a model, by the name of the MLP; `sizes` is for whoever reads the config."""

    layers: Mapping[str, Layer]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with format and version."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        return {"format": FORMAT, "version": VERSION, **self.sizes, "layers": layers}

    @property
    def digest(self) -> str:
        """SHA-256 of what the layers are; weights are marked with it."""
        text = json.dumps({name: layer.to_dict() for name, layer in self.layers.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_dict(cls, data: Any, source: str) -> Structure:
        """The structure of plain data.

        Raises:
            CheckpointError: it is none, or of a newer version.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise CheckpointError(
                f"{source} is not of a model converted by Flexpert: its config has no entry {_ENTRY!r} of "
                f"the format {FORMAT!r}; a dense model is loaded by its own library"
            )
        if data.get("version") != VERSION:
            raise CheckpointError(
                f"{source} has conversion format {data.get('version')!r}, this Flexpert reads {VERSION}; "
                f"update it"
            )
        try:
            return cls(layers={name: Layer.from_dict(layer) for name, layer in data["layers"].items()})
        except (KeyError, TypeError, AttributeError, FlexpertError) as error:
            raise CheckpointError(
                f"{source} is damaged: its entry {_ENTRY!r} cannot be read: {error}"
            ) from error


def get_structure(model: nn.Module) -> Structure:
    """What conversions did to a model so far; without layers where there was none."""
    data = getattr(_holder(model), _ENTRY, None)
    return Structure(layers={}) if data is None else Structure.from_dict(data, type(model).__name__)


def set_structure(model: nn.Module, structure: Structure) -> None:
    """Write it into the model's config (or on the model, where it has no config); none without layers."""
    holder = _holder(model)
    if structure.layers:
        setattr(holder, _ENTRY, structure.to_dict())
    elif hasattr(holder, _ENTRY):
        delattr(holder, _ENTRY)


def _holder(model: nn.Module) -> Any:
    """What keeps the entry: a config that is written with the model, else the model."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_dict") and hasattr(config, "save_pretrained") else model


def has_config(model: nn.Module) -> bool:
    """Whether the model has a config of its library that is saved with it."""
    return _holder(model) is not model


def install(model: nn.Module, layer: Layer, moe: nn.Module) -> None:
    """Put a MoE layer (or what stands for it) in the place of a dense MLP."""
    place = layer.place
    module = nn.Sequential(moe, nn.Dropout(place.dropout)) if place.dropout else moe
    module.train(model.get_submodule(place.name).training)
    put(model, place.name, module)
    for name in place.identities:
        put(model, name, nn.Identity())


def check_places(model: nn.Module, structure: Structure, source: str) -> None:
    """Raise `CheckpointError` unless the model has every place that the structure names."""
    names = {name for name, _ in model.named_modules()}
    wanted = [
        path for layer in structure.layers.values() for path in (layer.place.name, *layer.place.identities)
    ]
    if missing := [path for path in wanted if path not in names]:
        raise CheckpointError(
            f"{source} converts {shorten(missing)}, which {type(model).__name__} does not have; give the "
            f"dense model that was converted"
        )


def moe_layers(model: nn.Module, layers: Choice) -> dict[str, tuple[Layer, MoE]]:
    """The MoE layers of a model that a choice names, by their name: those of conversions.

    In a model without a config of its own, others are found too; such a layer stands for itself. (In one with
    a config, that config says what they are, and would be wrong after a change.)

    Raises:
        ConfigError: none is named.
    """
    converted = {layer.place.layer: layer for layer in get_structure(model).layers.values()}
    chosen, found = matcher(layers), {}
    for name, module in model.named_modules():
        if not isinstance(module, MoE) or not name:
            continue
        layer = converted.get(name)
        if layer is None and module.config is not None and not has_config(model):
            layer = Layer(place=Place(name=name, first=(), last=""), moe=module.config, method="", pieces=1)
        if layer is not None:
            found[name] = layer, module
    named = {
        name: pair
        for name, pair in found.items()
        if chosen(name, pair[1]) or chosen(pair[0].place.name, pair[1])
    }
    if not named:
        raise ConfigError(
            f"layers={layers!r} names no converted layer; in this {type(model).__name__} there are: "
            f"{shorten(list(found)) or 'none'}"
        )
    return named


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
