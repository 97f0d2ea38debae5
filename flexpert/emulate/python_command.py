"""A Python program in forked ranks: importing torch costs seconds of processor time, a fork does not."""

from __future__ import annotations

import importlib
import os
import random
import runpy
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flexpert.core.errors import ConfigError

# What a program of torch.distributed imports in any case, once for all ranks.
PRELOADED = ("torch", "torch.distributed", "torch.distributed.device_mesh")


@dataclass(frozen=True)
class PythonProgram:
    """A program as the words after `python` name it.

    Attributes:
        target: path of a script, or name of a module.
        is_module: whether it came after -m.
        arguments: of the program.
    """

    target: str
    is_module: bool
    arguments: tuple[str, ...]

    def run(self) -> None:
        """Run it as `__main__`, in this process."""
        if self.is_module:
            sys.path[0] = str(Path.cwd())
            sys.argv = ["-m", *self.arguments]  # runpy puts the module's file in the first place
            runpy.run_module(self.target, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(self.target).resolve().parent)
            sys.argv = [self.target, *self.arguments]
            runpy.run_path(self.target, run_name="__main__")


def parse_python(command: Sequence[str]) -> PythonProgram | None:
    """The program of `python [-u] SCRIPT ...` or `python [-u] -m MODULE ...`; None for other forms."""
    words = list(command[1:])
    while words and words[0] == "-u":  # lines are written at once in any case
        words.pop(0)
    if len(words) >= 2 and words[0] == "-m":
        return PythonProgram(words[1], True, tuple(words[2:]))
    if words and not words[0].startswith("-"):
        return PythonProgram(words[0], False, tuple(words[1:]))
    return None


def program_to_fork(command: Sequence[str], fork: bool | None) -> PythonProgram | None:
    """The program to run in forked ranks, None to execute the command in each.

    Args:
        command: the words.
        fork: True: fork; False: execute; None: fork what this interpreter would run anyway.

    Raises:
        ConfigError: True, and the command is no Python program of those forms.
    """
    if fork is False:
        return None
    program = parse_python(command) if Path(command[0]).name.startswith("python") else None
    if fork and program is None:
        raise ConfigError(
            f"fork: {' '.join(command)!r} is not `python SCRIPT ...` or `python -m MODULE ...`; "
            "without --fork each rank executes the command"
        )
    return program if fork or _is_this_python(command[0]) else None


def preload(modules: Sequence[str]) -> None:
    """Import what all ranks need.

    Raises:
        ConfigError: there is no such module.
    """
    try:
        for name in modules:
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"preload: {error}; name modules that this Python can import") from error


def run_as_fresh(program: PythonProgram) -> None:
    """Run the program as a new process would: generators seeded anew, threads as the environment says."""
    random.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.seed()
        with suppress(ValueError):
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))
    program.run()


def _is_this_python(name: str) -> bool:
    """Whether the command is the interpreter that runs this, and of the same environment."""
    path, here = shutil.which(name), Path(sys.executable).absolute()
    if path is None:
        return False
    found = Path(path).absolute()
    return found.parent == here.parent and found.resolve() == here.resolve()
