"""`flexpert build`: the native CPU kernels ahead of their first use."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from typing import Any

from flexpert.core.errors import ConfigError
from flexpert.ops.cpu import build as native
from flexpert.ops.cpu.seal import is_whole

NAME = "build"
HELP = "Compile the native CPU kernels into the cache now, instead of at their first use."
EXAMPLES = ("flexpert build", "flexpert build --force", "CXX=clang++ flexpert build --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--force."""
    parser.add_argument("--force", action="store_true", help="compile even if the library is in the cache")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compile and load; path, seconds, compiler.

    Raises:
        ConfigError: the kernels are turned off, or this machine cannot have them.
    """
    native.mode()  # refuses unknown values
    if os.environ.get("FLEXPERT_NATIVE") == "off":
        raise ConfigError(
            "FLEXPERT_NATIVE=off turns the native kernels off; unset it, or set auto or require"
        )
    start = time.perf_counter()
    try:
        compiler = native.find_compiler()
        cached = is_whole(native.target_path(compiler))
        path = native.build(force=options.force)
        native.load(path)
    except native.BuildError as error:
        raise ConfigError(str(error)) from error
    return {
        "path": str(path),
        "seconds": round(time.perf_counter() - start, 2),
        "compiler": shlex.join(compiler),
        "compiled": options.force or not cached,
    }


def describe(result: dict[str, Any]) -> str:
    """The facts as lines of text."""
    did = "compiled" if result["compiled"] else "already in the cache (--force compiles anew)"
    return f"{result['path']}\n{did}, {result['seconds']:.1f} s, compiler {result['compiler']}"
