"""The result as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .implementations import DECODE, FORWARD, TRAINING

Row = Mapping[str, Any]
EXPLANATION = """\
Medians of repetitions taken in turns; spread is the distance of the quartiles. 100 % of dense is the speed of
two plain matrix products with the same useful FLOPs (and their autograd), 100 % of stream a plain read of as
many bytes as the touched experts have. Peak MiB is the resident set of a process that does one training step
on one thread, PyTorch and the inputs included."""


def markdown(result: Mapping[str, Any]) -> str:
    """Machine facts, one table per configuration and dtype, and what was not measured."""
    return "\n".join(["# One mixture-of-experts layer", "", EXPLANATION, "", *sections(result)]) + "\n"


def sections(result: Mapping[str, Any]) -> list[str]:
    """Lines of `markdown` below its introduction."""
    machine, rows = result["machine"], result["rows"]
    live = ", ".join(f"{backend} for {dtype}" for dtype, backend in machine["backends"].items())
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {', '.join(machine['flags'])}; "
        f"PyTorch {machine['torch']}, Python {machine['python']}; load average {machine['load_average']}. "
        f"Live backend of the fused operator: {live}.",
    ]
    for config, dtype in dict.fromkeys((row["config"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["config"], row["dtype"]) == (config, dtype)]
        training = [row for row in mine if row["mode"] != DECODE]
        decode = [row for row in mine if row["mode"] == DECODE]
        lines += ["", f"## {config}, {dtype}", "", _shape(result["configs"][config], mine)]
        lines += ["", *_training(training)] if training else []
        lines += ["", *_decode(decode)] if decode else []
        shares = [row for row in result["routing"] if (row["config"], row["dtype"]) == (config, dtype)]
        lines += ["", _routing(shares)] if shares else []
    missing: dict[tuple[str, str], list[str]] = {}
    for entry in result["unavailable"]:
        places = missing.setdefault((entry["implementation"], entry["reason"]), [])
        places.append(f"{entry['config']} {entry['dtype']}")
    if missing:
        lines += ["", "Not measured:", ""]
        lines += [f"- {name} ({', '.join(places)}): {reason}" for (name, reason), places in missing.items()]
    return lines


def _shape(shape: Mapping[str, Any], rows: Sequence[Row]) -> str:
    tokens = ", ".join(str(tokens) for tokens in dict.fromkeys(row["tokens"] for row in rows))
    matrices = "gated, 3 matrices" if shape["gated"] else "2 matrices"
    factor = shape["capacity_factor"]
    return (
        f"T {tokens}; D {shape['model_dim']}, F {shape['hidden_dim']} ({matrices}, {shape['activation']}), "
        f"E {shape['num_experts']}, K {shape['top_k']}, "
        f"{'dropless' if factor is None else f'capacity factor {factor}'}."
    )


def _table(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    columns = head.count("|") - 1
    return [head, "|---" + "|---:" * (columns - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _training(rows: Sequence[Row]) -> list[str]:
    """One line per implementation, with forward and forward+backward side by side."""
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row["implementation"], {})[row["mode"]] = row
    lines = []
    for name, modes in by_name.items():
        cells = [name]
        for mode in (FORWARD, TRAINING):
            cells += _figures(modes[mode], "percent_of_dense") if mode in modes else ["-"] * 3
        training = modes.get(TRAINING, {})
        lines.append([*cells, _number(training.get("gflops")), _whole(training.get("peak_mib"))])
    head = (
        "| implementation | forward ms | spread | % of dense | fwd+bwd ms | spread | % of dense "
        "| fwd+bwd GFLOP/s | peak MiB |"
    )
    return _table(head, lines)


def _decode(rows: Sequence[Row]) -> list[str]:
    """One line per number of tokens and implementation."""
    lines = [
        [
            str(row["implementation"]),
            str(row["tokens"]),
            *_figures(row, "percent_of_stream"),
            _number(row["gb_per_s"]),
        ]
        for row in rows
    ]
    return _table("| implementation | tokens | decode ms | spread | % of stream | GB/s |", lines)


def _figures(row: Row, percent: str) -> list[str]:
    return [_number(row["median_ms"]), f"{row['spread_percent']:.0f} %", f"{row[percent]:.0f}"]


def _routing(shares: Sequence[Row]) -> str:
    """One line, of all modes and numbers of tokens."""
    parts = []
    for share in shares:
        place = f"decode of {share['tokens']}" if share["mode"] == DECODE else share["mode"]
        parts.append(f"{share['percent']:.1f} % ({place})")
    return f"Router, dispatch and combine take of the layer's time: {', '.join(parts)}."


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
