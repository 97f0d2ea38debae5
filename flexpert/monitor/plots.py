"""Plots of a run: the learning curve, and which expert of which layer did how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexpert.core.errors import FlexpertError


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing to files.

    Raises:
        FlexpertError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise FlexpertError("plots need matplotlib: pip install 'flexpert[plots]'") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def learning_curve(
    lines: Sequence[Mapping[str, Any]], path: Path, name: str = "accuracy", score: float | None = None
) -> None:
    """Draw loss and a score over steps as PNG.

    Args:
        lines: entries of metrics.jsonl.
        path: of the picture.
        name: of the score in the lines, such as "accuracy"; drawn from 0, and to 1 where it is never more.
        score: on held-out data, drawn as a line where given.
    """
    plt = pyplot()
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [line["step"] for line in lines]
    left.plot(steps, [line["loss"] for line in lines], color="tab:blue", label="training loss")
    left.set(xlabel="step", ylabel="training loss")
    right = left.twinx()
    values, label = [line.get(name) for line in lines], name.replace("_", " ")
    top = max([1.0, *(value for value in (*values, score) if value is not None)])
    right.plot(steps, values, color="tab:orange", label=f"training {label}")
    right.set(ylabel=label, ylim=(0, top))
    if score is not None:
        right.axhline(score, color="tab:green", linestyle="--", label=f"held-out {label} {score:.4f}")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def load_map(load: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw a layer-by-expert heat map of load as PNG; 1 is an even share.

    Args:
        load: layer name to each expert's share of the rows.
        path: of the picture.
    """
    plt = pyplot()
    rows = [[share * len(shares) for share in shares] for shares in load.values()]
    width = max(len(row) for row in rows)
    padded = [row + [float("nan")] * (width - len(row)) for row in rows]
    wide = width > 32  # no room for numbers
    size = (16, 1.5 + 0.2 * len(rows)) if wide else (2 + 0.6 * width, 1.5 + 0.5 * len(rows))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    top = max(2.0, *(max(row) for row in rows))
    image = axes.imshow(padded, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    for y, row in enumerate([] if wide else rows):
        for x, value in enumerate(row):
            color = "black" if value > 0.7 * top else "white"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    axes.set(
        xlabel="expert",
        xticks=range(0, width, 8 if wide else 1),
        yticks=range(len(rows)),
        yticklabels=list(load),
    )
    axes.set_title("load of each expert (1 = even share)")
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
    plt.close(figure)
