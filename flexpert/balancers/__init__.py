"""Balancers: they move router state by an explicit `step()`."""

from __future__ import annotations

from .bias import BiasBalancer

__all__ = ["BiasBalancer"]
