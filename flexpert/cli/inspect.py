"""`flexpert inspect`: what the routers of a model do on real text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

NAME = "inspect"
HELP = "Show, for each layer of a saved model, which experts real text goes to; nothing is downloaded."
EXAMPLES = (
    "flexpert inspect runs/python-lm",
    "flexpert inspect models/OLMoE-1B-7B --text book.txt --out report",
    "flexpert inspect runs/python-lm/model --tokens 50000 --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the text and the folder for the report."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a saved model or of a run")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what to read (files of Python's standard library)"
    )
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens to read (8192)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write report.json, report.html and load.png there"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Inspect; the report, and the files written."""
    from flexpert.integrations.inspection import inspect_model, write_report

    report = inspect_model(options.model, text=options.text, tokens=options.tokens)
    if options.out is not None:
        report["files"] = [str(path) for path in write_report(report, options.out)]
    return report


def describe(result: dict[str, Any]) -> str:
    """The report as a table."""
    from flexpert.monitor.routing_table import routing_table

    lines = [f"{result['tokens']} tokens of {result['source']}", "", routing_table(result["layers"])]
    files = result.get("files", [])
    return "\n".join([*lines, *([""] if files else []), *files])
