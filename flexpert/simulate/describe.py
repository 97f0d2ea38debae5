"""Reading descriptions: a name with settings, `a100-ndv4:nodes=8`, or a YAML or JSON file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flexpert.core.errors import ConfigError
from flexpert.core.registry import check_options

SUFFIXES = (".yaml", ".yml", ".json")


def split_text(text: str, what: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings of `name:key=value,key=value`.

    Values are read as YAML, so that numbers, true and null are what they look like.

    Raises:
        ConfigError: a setting without "=", or one that is given twice.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ConfigError(f"{what} {text!r}: {part!r} is no setting; expected NAME:key=value,key=value")
        if key in settings:
            raise ConfigError(f"{what} {text!r}: {key} is given twice")
        settings[key] = _value(what, key, value)
    return name, settings


def split_file(text: str, what: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The mapping of a file and the settings after its name; None where the text names no file.

    Raises:
        ConfigError: a file that is missing or is no mapping of names.
    """
    name, settings = split_text(text, what)
    path = Path(name)
    if path.suffix not in SUFFIXES:
        return None
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {name!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} {name!r} is no YAML or JSON: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{what} {name!r}: expected a mapping of names to values, found {data!r:.60}")
    return data, settings


def check_fields(what: str, cls: type, data: Mapping[str, Any]) -> None:
    """Refuse keys that a dataclass has no field for, and data without those that it needs.

    Raises:
        ConfigError: the message names the field.
    """
    fields = [field for field in dataclasses.fields(cls) if field.init]
    check_options(what, data, [field.name for field in fields])
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in data:
            raise ConfigError(f"{what}: {field.name} is missing")


def _value(what: str, key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{what}: {key}={text!r} is no value") from None
