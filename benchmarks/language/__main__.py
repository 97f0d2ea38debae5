"""Designs of a MoE language model at equal active width and equal steps, several seeds.

    python -m benchmarks.language [--seeds 3] [--steps 200] [--output benchmarks/language/results.json]

All designs have the dense twin's active MLP width: 1 expert of 640, 2 of 320, or 4 of 128 and one shared.
With top-p the number of experts per token is what the router makes of it, and is measured. Writes the figures
of every run, and their mean and spread, as JSON and as a Markdown table.
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

from flexpert.scope import routing_scope
from flexpert.train.config import load_config
from flexpert.train.job import train
from flexpert.train.language import LanguageTask

CONFIG = Path(__file__).parents[2] / "configs" / "python_lm.yaml"
LOSS = ["model.router=linear", "model.balance_weight=0.01", "model.num_shared_experts=0"]
TOP_P = "model.router={name: linear, selection: {name: top_p, p: 0.35}}"
MODELS: dict[str, list[str]] = {
    "dense twin": ["model.num_experts=0"],
    "top-1": [*LOSS, "model.num_experts_per_tok=1", "model.expert_hidden_dim=640"],
    "top-2": [*LOSS, "model.num_experts_per_tok=2", "model.expert_hidden_dim=320"],
    "fine-grained and shared": [],
    "top-p 0.35": [TOP_P, "model.balance_weight=0.01"],
}


def experts_per_token(folder: Path, settings: list[str]) -> float:
    """Rows that experts compute per token of held-out text, shared experts not counted."""
    task = LanguageTask.from_saved(load_config(CONFIG, settings), folder)
    text = task.dataset.valid[: 64 * task.length].view(64, -1).long()
    with torch.no_grad(), routing_scope(task.model.eval()) as scope:
        task.model(text, use_cache=False)
    parts = list(scope.stats.values())
    return float(sum(s.load_E.sum() for s in parts)) / float(sum(s.tokens for s in parts)) if parts else 0.0


def run(seeds: int, steps: int) -> list[dict[str, Any]]:
    """Train every model with every seed, one after another."""
    rows = []
    per_epoch = LanguageTask(load_config(CONFIG)).steps_per_epoch
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for model, changes in MODELS.items():
                settings = [f"optimizer.epochs={steps / per_epoch}", f"seed={seed}", f"output={folder}"]
                result = train(load_config(CONFIG, [*settings, "name=run", *changes]))
                assert result is not None
                figures = {key: result[key] for key in ("validation_loss", "bits_per_byte", "steps")}
                figures["experts_per_token"] = experts_per_token(Path(result["run"]) / "model", changes)
                rows.append({"model": model, "seed": seed, **figures})
                print(rows[-1], file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and sample deviation over seeds, as Markdown."""
    lines = [
        "| model | experts per token | validation loss, mean | spread (std) | bits per byte | each seed |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        own = [row for row in rows if row["model"] == model]
        losses = [row["validation_loss"] for row in own]
        spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        bits, active = (
            statistics.mean(row[key] for row in own) for key in ("bits_per_byte", "experts_per_token")
        )
        each = ", ".join(f"{value:.4f}" for value in losses)
        lines.append(
            f"| {model} | {active:.2f} | {statistics.mean(losses):.4f} | {spread:.4f} | {bits:.4f} | {each} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, print the table, write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.json"))
    options = parser.parse_args()
    rows = run(options.seeds, options.steps)
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "steps": options.steps}
    options.output.write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    command = f"python -m benchmarks.language --seeds {options.seeds} --steps {options.steps}"
    text = f"`{command}`: {options.steps} steps of 8,192 bytes.\n\n{table(rows)}\n"
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
