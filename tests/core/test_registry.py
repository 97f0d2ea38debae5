"""Names for parts, those of other packages included."""

from __future__ import annotations

import pytest

from flexpert import ConfigError
from flexpert.core import registry
from flexpert.core.registry import Registry, check_options, keyword_names, split_spec, suggest


class Point:
    """An entry point that remembers whether it was loaded."""

    def __init__(self, name, value):
        self.name, self.value, self.loaded = name, value, 0

    def load(self):
        self.loaded += 1
        return self.value


@pytest.fixture
def plugins(monkeypatch):
    points = [Point("foreign", "foreign part"), Point("other", "other part")]
    monkeypatch.setattr(
        registry, "entry_points", lambda *, group: points if group == "flexpert.tests" else []
    )
    return points


def make_registry():
    parts = Registry("part", group="flexpert.tests")
    parts.register("own")("own part")
    return parts


def test_parts_of_other_packages_are_loaded_when_named(plugins):
    parts = make_registry()
    assert parts.get("own") == "own part"
    assert parts.names() == ["foreign", "other", "own"]
    assert [point.loaded for point in plugins] == [0, 0]
    assert parts.get("foreign") == parts.get("foreign") == "foreign part"
    assert [point.loaded for point in plugins] == [1, 0]


def test_unknown_names_list_the_valid_ones(plugins):
    with pytest.raises(
        ConfigError, match="unknown part 'forein': did you mean 'foreign'. valid: foreign, other, own"
    ):
        make_registry().get("forein")


def test_a_name_is_taken_once():
    parts = make_registry()
    with pytest.raises(ConfigError, match="part name 'own' is taken by 'own part'; choose another"):
        parts.register("own")("usurper")


def test_specs():
    given = {"name": "linear", "a": 1}
    name, options = split_spec(given, "router")
    assert (name, options) == ("linear", {"a": 1})
    options["b"] = 2
    assert given == {"name": "linear", "a": 1}
    assert split_spec("linear", "router") == ("linear", {})
    for bad in (None, {}, {"name": 3}, ["linear"]):
        with pytest.raises(ConfigError, match="router=.*expected a name or a dict with the key 'name'"):
            split_spec(bad, "router")


def test_options():
    def function(positional, *, first, second=2):
        return positional, first, second

    assert keyword_names(function) == ["first", "second"]
    check_options("thing", {"first": 1}, ["first"])
    with pytest.raises(ConfigError, match="thing: unknown option 'fist'; did you mean 'first'. valid: first"):
        check_options("thing", {"fist": 1}, ["first"])


def test_suggest_without_a_likely_one():
    assert suggest("zzz", ["a", "b"]) == "valid: a, b"
    assert suggest("zzz", []) == "valid: none"
