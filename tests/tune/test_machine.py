"""Machines as data: round trips, rates between their points, errors that name the field."""

from __future__ import annotations

import dataclasses
import json

import pytest

from flexpert.core.errors import ConfigError
from flexpert.tune import Link, Machine, Rate
from flexpert.tune.presets import DEVICES, preset
from tests.tune.cases import machine_of

PRESETS = {name: preset(name) for name in DEVICES}


@pytest.mark.parametrize("machine", [machine_of(processors=2, sharing=8), *PRESETS.values()], ids=str)
def test_json_and_back(machine):
    assert Machine.from_json(machine.to_json()) == machine


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 9}, "format=9"),
        ({"memory_bandwidth": -1}, "memory_bandwidth=-1"),
        ({"overlap": 1.5}, "overlap=1.5"),
        ({"sharing": 0}, "sharing=0"),
        ({"processors": 0}, "processors=0"),
        ({"speed": 3}, "'speed'"),
        ({"inside": {"latency": 0.0}}, "machine.inside: bandwidth is missing"),
        ({"between": {"latency": 0.0, "bandwidth": "fast"}}, "machine.between: link: bandwidth='fast'"),
        ({"between": 7}, "machine.between=7"),
        ({"rates": {}}, "rates="),
        ({"rates": {"float32": {"rows": [4, 2], "forward": [1, 1], "backward": [1, 1]}}}, "rows="),
        ({"rates": {"float32": {"rows": [4], "forward": [1, 1], "backward": [1]}}}, "forward="),
        ({"rates": {"float32": {"rows": [4], "forward": [1]}}}, "backward is missing"),
        ({"rates": 3}, "machine: rates=3"),
        ({"rates": {"float32": 3}}, "machine.rates[float32]=3"),
        ({"rates": {"float32": {"rows": 4, "forward": [1], "backward": [1]}}}, "rows=4"),
        ({"rates": {"float32": {"rows": ["4"], "forward": [1], "backward": [1]}}}, "rows=('4',)"),
        ({"rates": {"float32": {"rows": [4], "forward": ["fast"], "backward": [1]}}}, "forward=('fast',)"),
        ({"rates": {"float32": {"rows": [4], "forward": [1], "backward": 2.0}}}, "backward=2.0"),
        ({"memory": "80 GiB"}, "memory='80 GiB'"),
        ({"facts": 3}, "facts=3"),
    ],
)
def test_errors_name_the_field(change, named):
    data = machine_of().to_dict() | change
    with pytest.raises(ConfigError) as error:
        Machine.from_dict(data)
    assert named in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_what_is_no_machine(text):
    with pytest.raises(ConfigError, match="machine"):
        Machine.from_json(text)


def test_the_machine_of_one_dtype():
    rates = preset("a100-ndv4").rates
    machine = machine_of(rates=dict(rates))
    assert machine.only("bfloat16") == machine_of(rates={"bfloat16": rates["bfloat16"]})
    with pytest.raises(ConfigError, match="no rates of float64"):
        machine.only("float64")


def test_time_is_linear_between_points():
    rate = Rate(rows=(10, 30), forward=(100.0, 150.0), backward=(50.0, 50.0))
    # 10 rows of 5 operations take 0.5 s, 30 rows 1 s.
    assert rate.seconds(10, 5) == pytest.approx(0.5)
    assert rate.seconds(20, 5) == pytest.approx(0.75)
    assert rate.seconds(30, 5) == pytest.approx(1.0)
    assert rate.seconds(60, 5) == pytest.approx(2.0)  # at the last rate
    assert rate.seconds(3, 5) == pytest.approx(0.5)  # as long as ten
    assert rate.seconds(0, 5) == 0
    assert rate.seconds(20, 5, backward=True) == pytest.approx(2.0)


def test_unknown_dtype_and_preset():
    with pytest.raises(ConfigError, match="no rates of float64"):
        machine_of().rate("float64")
    with pytest.raises(ConfigError, match="did you mean 'a100-ndv4'"):
        preset("a100-ndv")


def test_presets_are_said_to_be_from_public_data():
    for machine in PRESETS.values():
        assert "not measured here" in json.dumps(dict(machine.facts))
        rates = machine.rate("bfloat16").forward
        assert list(rates) == sorted(rates)
    a100, h100 = PRESETS["a100-ndv4"], PRESETS["h100-sxm"]
    assert h100.rate("bfloat16").forward[-1] > a100.rate("bfloat16").forward[-1]
    # Measured: 236 GB/s of NVLink's specified 300 against 24 of the network's 25 for each GPU.
    assert a100.inside.bandwidth / (a100.between.bandwidth / 8) == pytest.approx(9.85, rel=0.01)


def test_links_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Link(latency=0.0, bandwidth=1.0).latency = 1.0
