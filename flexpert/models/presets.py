"""Configurations by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from flexpert.core.errors import ConfigError
from flexpert.core.registry import check_options, keyword_names, suggest

Config = TypeVar("Config", bound=PreTrainedConfig)


def from_preset(
    kind: type[Config],
    presets: Mapping[str, Mapping[str, Any]],
    name: str,
    overrides: Mapping[str, Any],
    more: Sequence[str] = (),
) -> Config:
    """A configuration with the settings of a preset, and others in place of some.

    Args:
        kind: of the configuration.
        presets: settings by name.
        name: of the preset.
        overrides: settings in place of the preset's.
        more: settings that `kind` takes besides its fields.

    Raises:
        ConfigError: an unknown name or setting (the valid ones are listed), or a bad value.
    """
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}: {suggest(name, presets)}")
    names = [key for key in keyword_names(kind) if not key.startswith("_")]
    check_options(f"preset {name!r}", overrides, [*names, *more])
    try:
        return kind(**{**presets[name], **overrides})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"preset {name!r}: {' '.join(str(error).split())}") from None
