"""A model on disk, whichever library saved it: found, and loaded without a network or code of its folder."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from flexpert.convert import load
from flexpert.core.errors import CheckpointError, ConfigError
from flexpert.train.config import TrainConfig
from flexpert.train.folder import model_folder, stored_config


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """Where a model lies, and what it is.

    Attributes:
        folder: with config.json and safetensors.
        config: of transformers.
        run: the settings of the run that made it; None where it comes from none.
    """

    folder: Path
    config: Any
    run: TrainConfig | None

    @property
    def reads_bytes(self) -> bool:
        """Whether its tokens are bytes: a language model of ours with 256 of them."""
        return bool(self.config.model_type == "flexpert_moe_lm" and self.config.vocab_size == 256)

    @property
    def is_converted(self) -> bool:
        """Whether `flexpert.convert` made it of a dense model, whose class its config names."""
        return hasattr(self.config, "flexpert")

    @property
    def reads_images(self) -> bool:
        """Whether it is an image model of ours."""
        return hasattr(self.config, "image_size") and hasattr(self.config, "moe_places")


def find_model(folder: Path) -> SavedModel:
    """The model in a folder, or in the folder of a run.

    Raises:
        ConfigError: there is none, or transformers is missing or does not know its kind.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("models are read by transformers: pip install 'flexpert[hf]'")
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}; name one with a saved model (config.json and safetensors) or that "
            f"of a run. Models are not downloaded: `hf download {folder} --local-dir FOLDER` does that"
        )
    run = None
    if (folder / "config.yaml").exists():
        folder, run = model_folder(folder)
    elif (folder.resolve().parent / "config.yaml").exists():
        run = stored_config(folder.resolve().parent)
    if not (folder / "config.json").exists():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ConfigError(f"{folder} holds no saved model: it has {names}, and no config.json")
    return SavedModel(folder=folder, config=_config(folder), run=run)


def load_model(found: SavedModel) -> nn.Module:
    """The model, for evaluation, on a GPU if there is one.

    Raises:
        ConfigError: its class is not known.
        CheckpointError: weights that are missing, damaged or not safetensors.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if found.is_converted:
        return load(found.folder).to(device)
    folder, kind = found.folder, class_of(found)
    options = {"local_files_only": True, "use_safetensors": True, "dtype": "auto"}
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as {kind.__name__}: {_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of its config, such as {missing[0]}; take "
            f"config.json and weights from the same model"
        )
    loaded: nn.Module = model.eval().to(device)
    return loaded


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    import flexpert.models  # noqa: F401  (makes its models known to AutoConfig)

    from .transformers.library import moe_module

    moe_module()  # an old transformers has no interface for experts
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be used: {_line(error)}") from error


def class_of(found: SavedModel) -> Any:
    """The class that its config names.

    Raises:
        ConfigError: there is none of that name.
    """
    import transformers

    from flexpert import models

    names = found.config.architectures or []
    for name in names:
        kind = getattr(models, name, None) or getattr(transformers, name, None)
        if kind is not None:
            return kind
    raw = json.loads((found.folder / "config.json").read_text(encoding="utf-8"))
    raise ConfigError(
        f"{found.folder / 'config.json'} names the architectures {names}, and transformers "
        f"{transformers.__version__} has none of them (model_type={raw.get('model_type')!r}); code in the "
        f"folder is not run: install the release of transformers that has this model"
    )


def _line(error: Exception) -> str:
    """The first sentence or two of a message that may fill a page."""
    return " ".join(str(error).split())[:300]
