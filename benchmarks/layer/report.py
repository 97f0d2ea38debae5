"""The result as a Markdown page."""

from __future__ import annotations

from typing import Any

from .problem import SHAPES


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """One line per contender, with forward and forward+backward side by side."""
    lines = [
        "| contender | forward ms | spread | % of dense | fwd+bwd ms | spread | % of dense | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["contender"], {})[row["direction"]] = row
    for name, pair in by_name.items():
        cells = [name]
        for direction in ("forward", "forward+backward"):
            row = pair[direction]
            cells += [
                f"{row['median_ms']:.1f}",
                f"{row['spread_percent']:.0f} %",
                f"{row['percent_of_dense']:.0f}",
            ]
        peak = pair["forward+backward"]["peak_mib"]
        cells.append("-" if peak is None else f"{peak:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """Machine facts and one table per shape and dtype."""
    machine = result["machine"]
    lines = [
        "# Training step of one layer",
        "",
        "Medians of interleaved repetitions; spread is the distance of the quartiles. 100 % of dense is the",
        "speed of two plain matrix products with the same useful FLOPs (and their autograd). Peak MiB is the",
        "resident set of a process that does one training step, PyTorch itself included.",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, {', '.join(machine['flags'])}; "
        f"PyTorch {machine['torch']}, Python {machine['python']}; load average {machine['load_average']}.",
    ]
    cells = dict.fromkeys((row["shape"], row["dtype"]) for row in result["rows"])
    for name, dtype in cells:
        shape = SHAPES[name]
        capacity = "dropless" if shape.capacity_factor is None else f"capacity factor {shape.capacity_factor}"
        lines += [
            "",
            f"## {name}, {dtype}",
            "",
            f"T {shape.tokens}, D {shape.model_dim}, F {shape.hidden_dim} ({shape.matrices}), "
            f"E {shape.num_experts}, K {shape.top_k}, {capacity}.",
            "",
            *_table([row for row in result["rows"] if (row["shape"], row["dtype"]) == (name, dtype)]),
        ]
    return "\n".join(lines) + "\n"
