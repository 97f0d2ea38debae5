"""Reading plain data into dataclasses; errors name the field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flexpert.core.errors import ConfigError
from flexpert.core.registry import check_options


def read(where: str, kind: Any, data: Any) -> Any:
    """A dataclass from plain data; lists become tuples.

    Raises:
        ConfigError: no object, an unknown or missing key, or a bad value.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}={data!r}: expected an object")
    check_keys(where, kind, data)
    try:
        return kind(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_keys(where: str, kind: Any, data: Mapping[str, Any]) -> None:
    """Refuse keys that a dataclass has no field for, and data without those that it needs.

    Raises:
        ConfigError: the message names the key.
    """
    fields = dataclasses.fields(kind)
    check_options(where, data, [f.name for f in fields])
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in data:
            raise ConfigError(f"{where}: {f.name} is missing")


def check_numbers(
    where: str, owner: Any, names: Sequence[str], *, least: float | None = None, above: float | None = None
) -> None:
    """Refuse fields that are no finite numbers, or too small.

    Raises:
        ConfigError: the message names the field.
    """
    for name in names:
        value = getattr(owner, name)
        if (
            not is_number(value)
            or (least is not None and value < least)
            or (above is not None and value <= above)
        ):
            bound = f">= {least:g}" if least is not None else f"> {above:g}"
            raise ConfigError(f"{where}: {name}={value!r}, expected a number {bound}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
