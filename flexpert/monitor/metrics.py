"""Metrics of a run: one JSON line per entry, and TensorBoard events where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flexpert.core.stats import RoutingStats


def describe_routing(stats: Mapping[tuple[str, int], RoutingStats]) -> dict[str, Any]:
    """Plain figures of a step's routing; empty for a model without MoE layers.

    Returns:
        "drop_rate" over all layers, "max_violation" of the worst layer, "entropy" averaged over layers, and
        "load": layer name to the share of rows each expert computed.
    """
    if not stats:
        return {}
    load: dict[str, torch.Tensor] = {}
    for (layer, _), value in stats.items():
        load[layer] = load.get(layer, 0) + value.load_E
    values = list(stats.values())
    dropped = float(torch.stack([v.dropped for v in values]).sum())
    selected = float(torch.stack([v.selected_E.sum() for v in values]).sum())
    return {
        "drop_rate": dropped / max(selected, 1.0),
        "max_violation": float(torch.stack([v.max_violation for v in values]).max()),
        "entropy": float(torch.stack([v.entropy for v in values]).mean()),
        "load": {
            layer: [round(share, 5) for share in (rows / rows.sum().clamp(min=1)).tolist()]
            for layer, rows in load.items()
        },
    }


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut off by a kill is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what has no newline was cut off
    return [json.loads(line) for line in lines]


class MetricsWriter:
    """Appends to `metrics.jsonl` and, where the tensorboard package is installed, to `tensorboard/`."""

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / "metrics.jsonl"
        self._board: Any = None

    def rewind(self, step: int) -> None:
        """Forget the entries after `step`: a resumed run writes them again."""
        kept = [line for line in read_metrics(self._folder) if line["step"] <= step]
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        fresh.replace(self._path)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        """Append one entry; its numbers become scalars, its "load" one per layer and expert."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is None:
            return
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in ("step", "steps"):
                self._board.add_scalar(name, value, step)
        for layer, shares in line.get("load", {}).items():
            for expert, share in enumerate(shares):
                self._board.add_scalar(f"load/{layer}/{expert}", share, step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._board is not None:
            self._board.close()
