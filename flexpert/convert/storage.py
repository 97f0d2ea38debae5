"""Converted models on disk: config.json, model.safetensors, and nothing that runs code.

`save` marks the weights with the conversion they belong to. A folder written by the model's own
`save_pretrained(..., save_original_format=False)` can be loaded too; without that argument some classes (ViT)
write other names than their own.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexpert.core.errors import CheckpointError, ConfigError
from flexpert.layer import MoE

from .card import conversion_card
from .conversion import update_structure
from .reading import shorten
from .structure import Layer, Structure, check_places, get_structure, has_config, install

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OWN_CONFIG = "flexpert.json"  # of a model without a config of its own
_MARK = "flexpert_conversion"


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a converted model to a new folder: whole, or not at all.

    A model of transformers gets its config.json (with the conversion in it) and generation config; any other
    a `flexpert.json`. Both get a model card, README.md.

    Raises:
        ConfigError: the folder exists, or the model was not converted.
    """
    folder, structure = Path(folder), get_structure(model)
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another folder, or remove it")
    if not structure.layers:
        raise ConfigError(
            f"this {type(model).__name__} is not converted; save a dense model as its own library does"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        _write_config(model, structure, temporary)
        card = conversion_card(model, structure, built_from_config=has_config(model))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        tensors = {name: tensor.detach().contiguous() for name, tensor in _own_tensors(model).items()}
        marks = {"format": "pt", _MARK: structure.digest}
        save_file(tensors, temporary / WEIGHTS, metadata=marks)
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Build a converted model from a folder, in evaluation mode.

    Args:
        folder: written by `save` or `save_pretrained`.
        model: the dense model, whose weights do not matter; it becomes the converted one. None: it is built
            from the folder's config, of a class known to transformers or registered with its Auto classes.

    Raises:
        CheckpointError: no converted model, or weights of another model or conversion; then nothing has been
            loaded.
        ConfigError: `model` is missing for a model without a config.
    """
    folder = Path(folder)
    data = _read_config(folder)
    structure = Structure.from_dict(data.get("flexpert"), str(folder))
    files = _weight_files(folder)
    _check_marks(files, structure)
    if model is None:
        model = _build_dense(folder, data)
    elif get_structure(model).layers:
        raise ConfigError("model is converted already; give the dense one")
    check_places(model, structure, str(folder))
    empty = {name: _on_meta(layer) for name, layer in structure.layers.items()}
    ties = _ties(model)
    _check_tensors(files, _expected(model, structure, empty), ties, folder)
    for name, layer in structure.layers.items():
        install(model, layer, empty[name])
    _fill(model, files, ties)
    update_structure(model, structure.layers)
    return model.eval()


def _write_config(model: nn.Module, structure: Structure, folder: Path) -> None:
    if not has_config(model):
        text = json.dumps({"flexpert": structure.to_dict()}, indent=2)
        (folder / _OWN_CONFIG).write_text(text + "\n", encoding="utf-8")
        return
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with one name for each tensor that has several."""
    state = model.state_dict(keep_vars=True)
    return dict({id(tensor): (name, tensor) for name, tensor in reversed(state.items())}.values())


def _ties(model: nn.Module) -> list[list[str]]:
    """Names that share one parameter, such as those of tied embeddings."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (_OWN_CONFIG, "config.json"):
        with suppress(FileNotFoundError, NotADirectoryError):
            try:
                data = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{folder / name} is damaged: {error}") from error
            return data if isinstance(data, dict) else {}
    raise CheckpointError(f"{folder} holds no model: it has neither config.json nor {_OWN_CONFIG}")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} has no {WEIGHTS}, nor an {_INDEX} that can be read") from error
    files = [folder / name for name in names]
    if odd := [file for file in files if file.parent != folder or not file.is_file()]:
        raise CheckpointError(f"{folder / _INDEX} names {odd[0].name}, which is not in its folder")
    return files


def _check_marks(files: list[Path], structure: Structure) -> None:
    """Raise `CheckpointError` for weights that say they belong to another conversion."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                mark = (reader.metadata() or {}).get(_MARK)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
        if mark not in (None, structure.digest):
            raise CheckpointError(
                f"{file} holds the weights of another conversion than the config beside it describes; take "
                f"both from the same model"
            )


def _build_dense(folder: Path, data: Mapping[str, Any]) -> nn.Module:
    if (folder / _OWN_CONFIG).exists():
        raise ConfigError(
            f"{folder} holds a model without a config of its own: give load(folder, model) the dense model, "
            f"whose weights do not matter"
        )
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: transformers does not know its model_type {data.get('model_type')!r}; import the "
            f"package that registers it first"
        ) from error
    del config.flexpert  # until it is converted
    with torch.random.fork_rng(devices=[]):
        return model_class(config)(config)


def import_transformers() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "models with a config.json need the package transformers: pip install 'flexpert[hf]'"
        ) from error
    return transformers


def model_class(config: Any) -> Any:
    """The class that a config names as its architecture: of transformers, or registered with an Auto class.

    Raises:
        CheckpointError: there is none of this name.
    """
    transformers = import_transformers()
    name = (getattr(config, "architectures", None) or [""])[0]
    if isinstance(found := getattr(transformers, name or "-", None), type):
        return found
    for auto in (getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModel")):
        mapping = getattr(auto, "_model_mapping", None) or {}
        found = mapping.get(type(config), ())
        for kind in found if isinstance(found, (tuple, list)) else [found]:
            if kind.__name__ == name:
                return kind
    raise CheckpointError(
        f"architecture {name!r} is not known to transformers {transformers.__version__}; import the package "
        f"that registers it first, or give load(folder, model) the dense model"
    )


def _on_meta(layer: Layer) -> MoE:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return MoE(layer.moe)


def _expected(model: nn.Module, structure: Structure, empty: Mapping[str, MoE]) -> dict[str, tuple[int, ...]]:
    """Shapes by name in the converted model's state dict, without converting anything."""
    places = [layer.place for layer in structure.layers.values()]
    gone = tuple(f"{name}." for place in places for name in (place.name, *place.identities))
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith(gone)}
    for name, layer in structure.layers.items():
        prefix = layer.place.layer
        shapes |= {f"{prefix}.{n}": tuple(t.shape) for n, t in empty[name].state_dict().items()}
    return shapes


def _check_tensors(
    files: list[Path], expected: Mapping[str, tuple[int, ...]], ties: list[list[str]], folder: Path
) -> None:
    """Raise `CheckpointError` unless the files have the converted model's tensors; reads headers alone."""
    given: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            given |= {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
    spare = {name for group in ties if given.keys() & set(group) for name in group}
    faults = {
        "missing": sorted(expected.keys() - given.keys() - spare),
        "unexpected": sorted(given.keys() - expected.keys()),
        "of another shape": [
            f"{name} {given[name]} (expected {shape})"
            for name, shape in expected.items()
            if given.get(name, shape) != shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {shorten(names, 4)}" for kind, names in faults.items() if names)
        raise CheckpointError(
            f"{folder} does not hold the weights of the conversion in its config; {listed}; take config and "
            f"weights from the same model, as written by flexpert.convert.save"
        )


def _fill(model: nn.Module, files: list[Path], ties: list[list[str]]) -> None:
    """Take the tensors of the files as they are, dtype included; tied names stay tied."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    read: set[str] = set()
    for file in files:
        tensors = load_file(file, device=str(device))
        model.load_state_dict(tensors, strict=False, assign=True)
        read |= tensors.keys()
    for group in ties:
        source = next((name for name in group if name in read), None)
        if source is not None:
            parameter = model.get_parameter(source)
            for name in group:
                owner, _, own = name.rpartition(".")
                setattr(model.get_submodule(owner), own, parameter)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
