"""Names for parts: what a config may ask for, including what other packages add."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")
Spec = str | Mapping[str, Any]


def suggest(name: str, options: Iterable[str]) -> str:
    """The tail of an error message: the valid names, and the likely one first where there is one."""
    names = sorted(options)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names) or 'none'}"


def split_spec(spec: Spec, argument: str) -> tuple[str, dict[str, Any]]:
    """Split `"name"` or `{"name": ..., option: ...}` into the name and a fresh dict of options."""
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ConfigError(f"{argument}={spec!r}: expected a name or a dict with the key 'name'")
    return spec["name"], {key: value for key, value in spec.items() if key != "name"}


def check_options(owner: str, options: Mapping[str, Any], accepted: Iterable[str]) -> None:
    """Raise `ConfigError` for the first option that `owner` does not take."""
    names = list(accepted)
    for key in options:
        if key not in names:
            raise ConfigError(f"{owner}: unknown option {key!r}; {suggest(key, names)}")


def keyword_names(function: Callable[..., Any]) -> list[str]:
    """The keyword-only parameter names of a function or class constructor."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


class Registry(Generic[T]):
    """Parts of one kind by name.

    Other packages add theirs by an entry point in the group (`flexpert.routers`, ...); these are loaded when
    a name is not known here, so importing Flexpert never imports them.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that makes a part available under `name`; a name can be taken once."""

        def add(part: T) -> T:
            if name in self._parts:
                raise ConfigError(
                    f"{self.kind} name {name!r} is taken by {self._parts[name]!r}; choose another"
                )
            self._parts[name] = part
            return part

        return add

    def names(self) -> list[str]:
        """Every available name, entry points included (without loading them)."""
        return sorted({*self._parts, *(point.name for point in self._points())})

    def get(self, name: str) -> T:
        """The part of that name.

        Raises:
            ConfigError: no such name; the message lists the valid ones.
        """
        if name not in self._parts:
            for point in self._points():
                if point.name == name:
                    self._parts[name] = point.load()
        try:
            return self._parts[name]
        except KeyError:
            raise ConfigError(f"unknown {self.kind} {name!r}: {suggest(name, self.names())}") from None

    def _points(self) -> list[Any]:
        return list(entry_points(group=self.group))


ROUTERS: Registry[Any] = Registry("router", group="flexpert.routers")
EXPERTS: Registry[Any] = Registry("expert", group="flexpert.experts")
LOSSES: Registry[Any] = Registry("loss", group="flexpert.losses")
