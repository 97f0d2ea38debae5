"""Rates and times as people write them: `200mbit`, `500us`. Nothing is guessed: no unit, no number."""

from __future__ import annotations

import re

from flexpert.core.errors import ConfigError

RATES = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}  # bits per second, decimal, as tc counts them
TIMES = {"us": 10**3, "ms": 10**6, "s": 10**9}  # nanoseconds
NUMBER = re.compile(r"(\d+(?:\.\d+)?)([a-z]+)")


def parse_rate(text: str, name: str = "bandwidth") -> int:
    """Bits per second of a text such as "200mbit".

    Raises:
        ConfigError: another form or unit, or zero.
    """
    value = _parse(text, name, RATES, "200mbit")
    if value <= 0:
        raise ConfigError(f"{name}={text!r}: a link needs a rate above zero; to stop its traffic, cut it")
    return value


def parse_time(text: str, name: str = "latency") -> int:
    """Nanoseconds of a text such as "500us".

    Raises:
        ConfigError: another form or unit.
    """
    return _parse(text, name, TIMES, "500us")


def format_rate(bits: int | None) -> str:
    """The rate in its largest unit without a fraction, "no limit" for None."""
    return "no limit" if bits is None else _format(bits, RATES)


def format_time(nanoseconds: int) -> str:
    """The time in its largest unit without a fraction."""
    return _format(nanoseconds, TIMES) if nanoseconds else "0us"


def _parse(text: str, name: str, units: dict[str, int], example: str) -> int:
    found = NUMBER.fullmatch(text) if isinstance(text, str) else None
    if found is None or found[2] not in units:
        raise ConfigError(
            f"{name}={text!r}: expected a number and one of {', '.join(units)}, such as {example}"
        )
    return round(float(found[1]) * units[found[2]])


def _format(value: int, units: dict[str, int]) -> str:
    fitting = [name for name, unit in units.items() if value % unit == 0]
    name = max(fitting, key=lambda unit: units[unit]) if fitting else min(units, key=lambda unit: units[unit])
    return f"{value / units[name]:g}{name}"
