"""The program of the switch: compiled at its first use into the cache of the native kernels."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

from flexpert.core.errors import ConfigError
from flexpert.ops.cpu.build import BuildError, cache_folder, find_compiler

SOURCE = Path(__file__).parent / "csrc" / "switch.cpp"
FLAGS = ("-std=c++17", "-O2")
COMPILE_SECONDS = 120


def target_path() -> Path:
    """Where the program of this source is or would be."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:24]
    return cache_folder() / "emulate" / f"switch-{key}"


def _is_there(path: Path) -> bool:
    """Whether this user can see the file: another user's cache may be closed."""
    try:
        return path.exists()
    except PermissionError:
        return False


def why_not() -> str:
    """Why the program cannot be had, "" if it can or is in the cache."""
    if _is_there(target_path()):
        return ""
    try:
        find_compiler()
    except BuildError as error:
        return str(error)
    return ""


def build() -> Path:
    """The path of the program, compiled if it is not in the cache.

    Raises:
        ConfigError: there is no compiler, it fails, or the cache cannot be written to.
    """
    target = target_path()
    if _is_there(target):
        return target
    try:
        compiler = find_compiler()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two that compile at once put the same program there, each by one rename.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "switch"
            done = subprocess.run(
                [*compiler, *FLAGS, str(SOURCE), "-o", str(made)],
                capture_output=True,
                text=True,
                timeout=COMPILE_SECONDS,
                check=False,
            )
            if done.returncode != 0:
                lines = [line for line in done.stderr.splitlines() if "error" in line]
                raise ConfigError(
                    f"the switch does not compile: {lines[0] if lines else done.stderr.strip()[:200]}"
                )
            made.replace(target)
    except (BuildError, OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"the switch cannot be compiled ({error}); mode='bandwidth' needs no compiler"
        ) from error
    return target
