from __future__ import annotations

import pytest

from flexpert.core.errors import ConfigError
from flexpert.emulate.units import format_rate, format_time, parse_rate, parse_time


@pytest.mark.parametrize(
    ("text", "bits"), [("8kbit", 8_000), ("200mbit", 200_000_000), ("1.5gbit", 1_500_000_000)]
)
def test_rates(text: str, bits: int) -> None:
    assert parse_rate(text) == bits
    assert parse_rate(format_rate(bits)) == bits


@pytest.mark.parametrize(
    ("text", "nanoseconds"), [("500us", 500_000), ("0.5ms", 500_000), ("2s", 2_000_000_000), ("0us", 0)]
)
def test_times(text: str, nanoseconds: int) -> None:
    assert parse_time(text) == nanoseconds
    assert parse_time(format_time(nanoseconds)) == nanoseconds


@pytest.mark.parametrize(
    "text",
    ["", "200", "mbit", "200Mbit", "200 mbit", "-1mbit", "200mb", "1e3mbit", "200mbit ", "1.mbit", "5ms"],
)
def test_another_form_of_rate_is_refused_with_its_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"uplink=.*expected a number and one of kbit, mbit, gbit"):
        parse_rate(text, "uplink")


@pytest.mark.parametrize("text", ["", "5", "ms", "5MS", "5 ms", "-5ms", "5m", "5ns", "200mbit"])
def test_another_form_of_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"latency=.*expected a number and one of us, ms, s"):
        parse_time(text)


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="above zero"):
        parse_rate("0mbit")


def test_no_limit() -> None:
    assert format_rate(None) == "no limit"
