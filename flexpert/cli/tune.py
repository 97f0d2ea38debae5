"""`flexpert tune`: what the tuner knows about plans, and why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError

NAME = "tune"
HELP = "Show what the tuner knows: each workload's plans, predicted and measured times, why the winner won."
EXAMPLES = (
    "flexpert tune --explain runs/fashion_mnist",
    "flexpert tune --explain ~/.cache/flexpert/tune/0123456789abcdef.json --limit 40",
    "flexpert tune --explain                       # all that the user's cache holds",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to explain."""
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        required=True,
        metavar="RUN or FILE",
        help="a run's folder or a dictionary's file; without one, those of the user's cache",
    )
    parser.add_argument("--limit", type=int, default=12, metavar="N", help="plans of each workload (12)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The dictionaries, bucket by bucket.

    Raises:
        ConfigError: nothing there, a damaged file, or a limit below 1.
    """
    from flexpert.train.tuning import PLANS
    from flexpert.tune import Dictionary
    from flexpert.tune.log import count_steps
    from flexpert.tune.report import bucket_report

    if options.limit < 1:
        raise ConfigError(f"limit={options.limit}: expected an integer >= 1")
    found: list[dict[str, Any]] = []
    for path in _files(options.explain):
        try:
            dictionary = Dictionary.read(path)
        except ConfigError as error:
            if options.explain:
                raise
            found.append({"file": str(path), "place": {}, "buckets": [], "error": str(error)})
            continue
        buckets = [
            bucket_report(shape, bucket, entry, dictionary.rows_per_bucket)
            for (shape, bucket), entry in sorted(dictionary.entries.items(), key=lambda item: item[0][1])
        ]
        found.append({"file": str(path), "place": dictionary.place, "buckets": buckets})
        steps, trials = count_steps(path.with_name(PLANS))
        if steps:
            found[-1] |= {"steps": steps, "trials": trials, "share": trials / steps}
    return {"dictionaries": found, "limit": options.limit}


def describe(result: dict[str, Any]) -> str:
    """The tables."""
    from flexpert.tune.report import table

    parts = []
    for dictionary in result["dictionaries"]:
        if "error" in dictionary:
            parts.append(f"{dictionary['error']}\n  not used; the next run there writes it anew")
            continue
        place = ", ".join(f"{name} {value}" for name, value in dictionary["place"].items() if value)
        parts.append(f"{dictionary['file']}\n  learnt on: {place}")
        if "steps" in dictionary:
            parts[-1] += f"\n  plans tried in {dictionary['trials']} of {dictionary['steps']} steps"
            parts[-1] += f" ({dictionary['share']:.1%})"
        parts += [table(bucket, result["limit"]) for bucket in dictionary["buckets"]] or ["  no workload yet"]
    return "\n\n".join(parts)


def _files(given: str) -> list[Path]:
    from flexpert.ops.cpu.build import cache_folder
    from flexpert.tune.dictionary import FORMAT

    if given:
        path = Path(given)
        if path.is_dir():
            path /= "tuner.json"
            if not path.exists():
                raise ConfigError(
                    f"{given} has no tuner.json: no run that was tuned (or none with checkpoints)"
                )
        return [path]
    folder = cache_folder() / "tune"
    files = [
        path
        for path in sorted(folder.glob("*.json"))
        if FORMAT in path.read_text(encoding="utf-8", errors="replace")[:200]
    ]
    if not files:
        raise ConfigError(f"{folder} holds no dictionary yet; train on several ranks, or name a run or file")
    return files
