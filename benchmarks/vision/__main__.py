"""SwinV2-MoE against its dense twin: equal active FLOPs, equal steps, several seeds.

    python -m benchmarks.vision [--seeds 3] [--epochs 2] [--output benchmarks/vision/results.json]

Writes the figures of every run, and their mean and spread, as JSON and as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from flexpert.train.config import load_config
from flexpert.train.job import train

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
MODELS = {"SwinV2-MoE": [], "dense twin": ["model.num_experts=0"]}


def run(seeds: int, epochs: float) -> list[dict[str, Any]]:
    """Train every model with every seed, one after another."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for model, changes in MODELS.items():
                settings = [f"optimizer.epochs={epochs}", f"seed={seed}", f"output={folder}", "name=run"]
                result = train(load_config(CONFIG, [*settings, *changes]))
                rows.append({"model": model, "seed": seed} | {k: result[k] for k in ("accuracy", "steps")})
                print(rows[-1], file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and sample deviation over seeds, as Markdown."""
    lines = [
        "| model | test accuracy, mean | spread (std) | each seed |",
        "|---|---|---|---|",
    ]
    for model in MODELS:
        own = [row for row in rows if row["model"] == model]
        accuracy = [row["accuracy"] for row in own]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else float("nan")
        each = ", ".join(f"{value:.4f}" for value in accuracy)
        lines.append(f"| {model} | {statistics.mean(accuracy):.4f} | {spread:.4f} | {each} |")
    return "\n".join(lines)


def main() -> None:
    """Run, print the table, write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.json"))
    options = parser.parse_args()
    rows = run(options.seeds, options.epochs)
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "epochs": options.epochs}
    options.output.write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    steps = rows[0]["steps"]
    text = (
        f"{options.epochs} epochs ({steps} steps) of Fashion-MNIST, {options.seeds} seeds.\n\n{table(rows)}\n"
    )
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
