"""A report of routers as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .routing_record import strongest_pairs

NUMBERS = 16  # experts whose loads are written as numbers; more are drawn as bars
_BARS = " ▁▂▃▄▅▆▇█"


def routing_table(layers: Sequence[dict[str, Any]]) -> str:
    """One line for each layer and, below, the load of its experts; 1 is an even share.

    Args:
        layers: of `RoutingRecord.report`.
    """
    head = (
        "layer",
        "tokens",
        "experts",
        "entropy",
        "max violation",
        "idle",
        "dropped",
        "pairs chosen together",
    )
    rows = [head, *(_cells(layer) for layer in layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    loads = [f"{layer['layer'].ljust(widths[0])}  {_load(layer)}" for layer in layers]
    return "\n".join([*(line.rstrip() for line in text), "", "load of each expert (1 = even share)", *loads])


def _cells(layer: dict[str, Any]) -> tuple[str, ...]:
    pairs = strongest_pairs(layer)
    return (
        layer["layer"],
        str(layer["tokens"]),
        str(layer["experts"]),
        f"{layer['entropy']:.3f}",
        f"{layer['max_violation']:.2f}",
        str(layer["idle"]),
        f"{layer['drop_rate']:.1%}",
        ", ".join(f"{a}+{b} {both / layer['tokens']:.1%} (x{lift:.1f})" for a, b, both, lift in pairs)
        or "none",
    )


def _load(layer: dict[str, Any]) -> str:
    even = sum(layer["load"]) / layer["experts"] or 1
    shares = [rows / even for rows in layer["load"]]
    if layer["experts"] <= NUMBERS:
        return " ".join(f"{share:5.2f}" for share in shares)
    top = max(2.0, *shares)
    bars = "".join(_BARS[round(share / top * (len(_BARS) - 1))] for share in shares)
    return f"{bars}  {min(shares):.2f} to {max(shares):.2f}"
