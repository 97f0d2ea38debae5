"""Conversion methods, one file each."""

from __future__ import annotations

from .base import Method, Parts
from .clone import Clone
from .granular import Granular
from .importance import Importance
from .slices import Slice

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (Clone, Granular, Slice, Importance)}

__all__ = ["METHODS", "Clone", "Granular", "Importance", "Method", "Parts", "Slice"]
