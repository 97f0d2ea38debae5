"""Pictures of simulated steps: a timeline, scaling curves, and which plan is best where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexpert.monitor.plots import pyplot

from .step import Step


def timeline(step: Step, path: Path) -> None:
    """Draw what the watched ranks compute and send over the time of a step, as PNG.

    Raises:
        FlexpertError: matplotlib is not installed.
    """
    plt = pyplot()
    lanes = [(rank, kind) for rank in step.timelines for kind in ("compute", "communication")]
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.6 * len(lanes)), layout="constrained")
    names = dict.fromkeys(event.name for line in step.timelines.values() for event in line.events)
    colors = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for place, (rank, kind) in enumerate(lanes):
        for event in step.timelines[rank].events:
            if event.kind == kind:
                axes.barh(place, 1e3 * (event.end - event.begin), left=1e3 * event.begin,
                          color=colors[event.name], edgecolor="white", linewidth=0.3)  # fmt: skip
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    axes.set(
        xlabel="ms", yticks=range(len(lanes)), yticklabels=[f"rank {rank} {kind}" for rank, kind in lanes]
    )
    axes.invert_yaxis()
    figure.legend(handles, list(colors), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def curves(
    lines: Mapping[str, Mapping[int, float]] | Mapping[str, Mapping[float, float]],
    path: Path,
    *,
    x: str,
    y: str,
    title: str,
    log: bool = True,
) -> None:
    """Draw one curve per name over numbers of ranks or bytes, as PNG.

    Args:
        lines: name to {x: y}.
        path: of the picture.
        x, y, title: words.
        log: the y axis is logarithmic; the x axis always is, of base 2.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set_xscale("log", base=2)
    if log:
        axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def plan_map(
    best: Sequence[Sequence[str]], columns: Sequence[Any], rows: Sequence[Any], path: Path, *, title: str
) -> None:
    """Draw which plan is best for tokens (columns) and parameters (rows), as PNG."""
    plt = pyplot()
    names = sorted({name for row in best for name in row})
    figure, axes = plt.subplots(
        figsize=(1.5 + 0.9 * len(columns), 1.8 + 0.5 * len(rows)), layout="constrained"
    )
    axes.imshow(
        [[names.index(name) for name in row] for row in best],
        cmap=plt.get_cmap("tab20", max(len(names), 2)), aspect="auto",
    )  # fmt: skip
    for y, row in enumerate(best):
        for x, name in enumerate(row):
            axes.text(x, y, name.replace(" ", "\n"), ha="center", va="center", fontsize=6)
    axes.set(
        xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows,
        xlabel="tokens of a rank", ylabel="parameters of an expert", title=title,
    )  # fmt: skip
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
