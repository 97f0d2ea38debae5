"""`flexpert evaluate`: the figures of a saved run on held-out data, also under another routing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flexpert.train.config import parse_overrides

NAME = "evaluate"
HELP = "Measure a run's saved model on held-out data, also with another top_k or capacity_factor."
EXAMPLES = (
    "flexpert evaluate runs/fashion-mnist",
    "flexpert evaluate runs/fashion-mnist capacity_factor=0.5 top_k=2",
    "flexpert evaluate runs/fashion-mnist --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run folder and overrides."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="top_k=... or capacity_factor=... (null: dropless)"
    )


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate; the figures of the task, seconds and what was dropped."""
    from flexpert.train.job import evaluate

    return evaluate(options.run, parse_overrides(options.overrides))


def describe(result: dict[str, Any]) -> str:
    """The figures as a line of text."""
    text = f"{result['headline']} in {result['seconds']:.1f} s"
    if result["routing"]:
        text += " with " + ", ".join(f"{key}={value}" for key, value in result["routing"].items())
    if "drop_rate" in result:
        text += f", {result['drop_rate']:.1%} of assignments dropped"
    return text
