"""The command `flexpert`: one subcommand a file."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import flexpert
from flexpert.core.errors import FlexpertError

from . import (
    bench,
    build,
    calibrate,
    convert,
    doctor,
    emulate,
    evaluate,
    generate,
    inspect,
    plan,
    simulate,
    train,
    tune,
)

COMMANDS = (
    train,
    evaluate,
    generate,
    bench,
    emulate,
    convert,
    inspect,
    tune,
    calibrate,
    simulate,
    plan,
    build,
    doctor,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="flexpert", description="Adaptive mixture-of-experts: train, evaluate, look inside."
    )
    parser.add_argument("--version", action="version", version=f"flexpert {flexpert.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        sub = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.HELP,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in module.EXAMPLES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.add_argument(
            "--json",
            action="store_true",
            help="one JSON object on standard output; progress on standard error",
        )
        sub.set_defaults(module=module)
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; key=value settings may stand before and after others, which argparse alone refuses."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    later = [word for word in rest if not word.startswith("-") and hasattr(options, "overrides")]
    if len(later) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if later:
        options.overrides += later
    return options


@contextmanager
def _announcements() -> Iterator[None]:
    """Show what the library logs (a download that takes a while, for example) on standard error."""
    logger, handler = logging.getLogger("flexpert"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0, or the one in the result; 2 for wrong usage or an error of ours, told in one line;
        130 after Ctrl-C.
    """
    options = _parse(arguments)
    try:
        with _announcements():
            result = options.module.run(options)
    except FlexpertError as error:
        print(f"flexpert {options.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"flexpert {options.command}: interrupted", file=sys.stderr)
        return 130
    if result is None:  # several ranks run the command, and another one tells
        return 0
    try:
        print(json.dumps(result) if options.json else options.module.describe(result), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(result.get("exit_status", 0))
