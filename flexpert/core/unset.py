"""A marker for "argument not given", so that None can mean None."""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal, TypeVar

T = TypeVar("T")


class Unset(Enum):
    """The type of `UNSET`; an enum has one instance in every process and survives deepcopy."""

    UNSET = "UNSET"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
UnsetType = Literal[Unset.UNSET]


def pick(value: T | UnsetType, default: T) -> T:
    """Return `value` where it was given, else `default`."""
    return default if value is UNSET else value
