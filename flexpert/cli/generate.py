"""`flexpert generate`: text from a trained language model, as it comes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

NAME = "generate"
HELP = "Continue a prompt with the language model of a run; text is written as it comes."
EXAMPLES = (
    "flexpert generate runs/python-lm --prompt 'def main():'",
    "flexpert generate runs/python-lm --prompt 'import ' --tokens 500 --temperature 0.5",
    "flexpert generate runs/python-lm --prompt 'class ' --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run folder, prompt and sampling."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--prompt", default="", help="text to continue; may be empty")
    parser.add_argument("--tokens", type=int, default=300, metavar="N", help="bytes to add (300)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest byte (0.8)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="share of probability to sample from (0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Generate; the prompt, its continuation and the speed."""
    from flexpert.train.generate import generate

    def write(piece: str) -> None:
        if not options.json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    write(options.prompt)
    return generate(
        options.run,
        options.prompt,
        max_new_tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        write=write,
    )


def describe(result: dict[str, Any]) -> str:
    """The speed; the text has been written."""
    return f"\n\n{result['tokens']} tokens, {result['tokens_per_second']:.0f} a second"
