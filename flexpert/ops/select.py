"""Which backend runs an operator: verified and chosen once per (operator, device type, dtype)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from flexpert.core.errors import ConfigError, InputError

from . import grouped, portable, portable_mlp, portable_route, reference
from .backend import Backend, CallFacts, Kernel
from .cpu import backend as cpu
from .cpu.build import native
from .wanted import wanted_kernel

__all__ = [
    "BACKENDS",
    "GROUPED_MM",
    "NATIVE",
    "PORTABLE",
    "Backend",
    "able",
    "kernel",
    "override",
    "report",
    "shortcut",
    "use_backend",
]


def _verify_portable(facts: CallFacts) -> str | None:
    if facts.operator == "assign":
        return None if facts.dtype == torch.int64 else f"keys must be int64, not {facts.dtype}"
    return None if facts.dtype.is_floating_point else f"{facts.dtype} is not a floating point type"


PORTABLE = Backend(
    name="portable",
    kernels={**portable.KERNELS, **portable_mlp.KERNELS, **portable_route.KERNELS},
    verify=_verify_portable,
)


def _verify_grouped(facts: CallFacts) -> str | None:
    if facts.device == "cpu":
        return "on a CPU it is slower than the portable loop"
    if facts.operator == "assign":
        return _verify_portable(facts)
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"PyTorch {torch.__version__} has no torch.nn.functional.grouped_mm"
    return None if facts.dtype == torch.bfloat16 else f"it is made for bfloat16, not {facts.dtype}"


GROUPED_MM = Backend(name="grouped_mm", kernels=grouped.KERNELS, verify=_verify_grouped)

NATIVE = Backend(name="native", kernels=cpu.KERNELS, verify=cpu.verify, instructions=cpu.instructions)

# In order of preference: the first that accepts a call runs it.
BACKENDS: list[Backend] = [NATIVE, GROUPED_MM, PORTABLE]

_live: dict[tuple[str, str, torch.dtype, str], Kernel] = {}
_forced: Backend | None = None
_reference: ModuleType | None = None


def _choose(facts: CallFacts, wanted: str = "auto") -> tuple[Backend | None, dict[str, str]]:
    """The backend for such calls, the wanted one if it can; and why each runs them or does not."""
    chosen: Backend | None = None
    why: dict[str, str] = {}
    forced = _forced if _forced is not None and facts.operator in _forced.kernels else None
    for backend in sorted(BACKENDS, key=lambda backend: backend.name != wanted):
        if facts.operator not in backend.kernels:
            why[backend.name] = "has no such kernel"
        elif forced is not None and backend is not forced:
            why[backend.name] = f"use_backend names {forced.name}"
        elif (reason := backend.verify(facts)) is not None:
            why[backend.name] = reason
        elif chosen is not None:
            why[backend.name] = f"{chosen.name} comes first"
        else:
            chosen = backend
            first = f"first backend that accepts {facts.dtype} on {facts.device}"
            uses = f", with {backend.instructions(facts)}" if backend.instructions else ""
            why[backend.name] = (first if forced is None else "use_backend names it") + uses
    return chosen, why


def kernel(operator: str, device: str, dtype: torch.dtype) -> Kernel:
    """The kernel that runs such calls, chosen at the first of them.

    Raises:
        InputError: no backend accepts them; the message gives each one's reason.
    """
    wanted = wanted_kernel()
    found = _live.get((operator, device, dtype, wanted))
    if found is None:
        chosen, why = _choose(CallFacts(operator=operator, device=device, dtype=dtype), wanted)
        if chosen is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
            raise InputError(f"no backend runs {operator} on {device} in {dtype} ({reasons})")
        found = _live[operator, device, dtype, wanted] = chosen.kernels[operator]
    return found


# What a shortcut stands for, each with the dtype of its first tensor; None for that of the tokens.
_PARTS: dict[str, dict[str, torch.dtype | None]] = {
    "routed_mlp": {"router_logits": None, "route": torch.float32},
    "chosen_mlp": {"assign": torch.int64},
}


def _no_shortcut(*args: Any) -> None:
    """What runs where there is none."""


def shortcut(name: str, dtype: torch.dtype, *, packed: bool) -> Kernel:
    """The native call for several operators on a CPU, where it would run each; else one that returns None."""
    key = f"{name} packed" if packed else name, "cpu", dtype, "auto"
    found = _live.get(key)
    if found is None:
        mlp: dict[str, torch.dtype | None] = {"grouped_mlp_packed" if packed else "grouped_mlp": None}
        parts = _PARTS[name] | mlp
        chosen = [
            _choose(CallFacts(operator=operator, device="cpu", dtype=kind or dtype))[0]
            for operator, kind in parts.items()
        ]
        runs = all(backend is NATIVE for backend in chosen)
        if runs and packed:
            runs = native().instructions(dtype) != "AVX2"  # which unpacks them
        found = cpu.SHORTCUTS[name] if runs else _no_shortcut
        _live[key] = found
    return found


def able(operator: str, device: str, dtype: torch.dtype) -> list[str]:
    """The names of the backends that can run such calls, the one that does first."""
    facts = CallFacts(operator=operator, device=device, dtype=dtype)
    return [b.name for b in BACKENDS if operator in b.kernels and b.verify(facts) is None]


def report(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """One row per operator and backend: `operator`, `backend`, `live` (does it run such calls?), `why`."""
    rows = []
    for operator in PORTABLE.kernels:
        facts = CallFacts(
            operator=operator, device=device, dtype=torch.int64 if operator == "assign" else dtype
        )
        chosen, why = _choose(facts)
        for backend in BACKENDS:
            row = {"operator": operator, "backend": backend.name, "live": backend is chosen}
            rows.append({**row, "why": why[backend.name]})
    return rows


def override() -> ModuleType | None:
    """The module whose functions replace whole operators, autograd included, inside `use_backend`."""
    return _reference


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator that the named backend has a kernel for by it, the others as usual, in the `with`.

    A call that the backend has a kernel for but cannot run is refused, with its reason. "reference" runs all
    operators by the naive loops.

    Raises:
        ConfigError: no backend of that name; the message lists those there are.
    """
    global _forced, _reference
    by_name = {backend.name: backend for backend in reversed(BACKENDS)}
    if name != "reference" and name not in by_name:
        raise ConfigError(f"backend={name!r} is unknown; choose one of: reference, {', '.join(by_name)}")
    before = _forced, _reference, dict(_live)
    _live.clear()
    _forced, _reference = by_name.get(name), reference if name == "reference" else None
    try:
        yield
    finally:
        _forced, _reference = before[:2]
        _live.clear()
        _live.update(before[2])
