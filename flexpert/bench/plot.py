"""The result as a picture: each implementation's percent of its reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from .implementations import DECODE, TRAINING

REFERENCES = ("dense", "stream")


def plot(result: Mapping[str, Any], path: Path) -> bool:
    """Draw bars of forward+backward and decode as PNG.

    Returns:
        Whether it was drawn: False without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "forward+backward, % of dense": _bars(result["rows"], TRAINING, "percent_of_dense"),
        "decode, % of a streaming read": _bars(result["rows"], DECODE, "percent_of_stream"),
    }
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(chain(*panels.values())))}
    panels = {title: bars for title, bars in panels.items() if bars}
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 3.5 * len(panels)), squeeze=False, layout="constrained"
    )
    for (title, bars), ax in zip(panels.items(), axes[:, 0], strict=True):
        places = list(dict.fromkeys(place for heights in bars.values() for place in heights))
        width = 0.8 / len(bars)
        for number, (name, heights) in enumerate(bars.items()):
            mine = [(x, heights[place]) for x, place in enumerate(places) if place in heights]
            left = [x + (number - (len(bars) - 1) / 2) * width for x, _ in mine]
            ax.bar(left, [height for _, height in mine], width, label=name, color=colors[name])
        ax.axhline(100, color="black", linewidth=0.8, linestyle="--")
        ax.set(title=title, xticks=range(len(places)), xticklabels=places)
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _bars(rows: list[dict[str, Any]], mode: str, key: str) -> dict[str, dict[str, float]]:
    """Percent by implementation and place."""
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["mode"] == mode and row["implementation"] not in REFERENCES:
            place = f"{row['config']} {row['dtype']}" + (f"\nT {row['tokens']}" if mode == DECODE else "")
            bars.setdefault(row["implementation"], {})[place] = row[key]
    return bars
