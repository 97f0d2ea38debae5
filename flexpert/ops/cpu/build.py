"""The native kernels: compiled on first use into the user's cache, loaded by ctypes, or the reason why not.

The sources need neither PyTorch's headers nor Python's: a few seconds of one compiler, one library per
version of sources, compiler, flags and PyTorch. OpenMP's symbols are left open on purpose: they bind to the
runtime that PyTorch has loaded, so that there is one pool of threads in the process.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from flexpert.core.errors import ConfigError

from .seal import is_whole, seal

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-strict-aliasing")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
AVX2 = ("-mavx2", "-mfma")
# By the source's name, which may be followed by the instructions. What several units instantiate from the
# standard library is linked once, as the first of them has it: those that run on fewer processors come later.
UNITS: dict[str, tuple[str, ...]] = {
    "probe": (),
    "layer": (),
    "route_avx2": AVX2,
    "f32_avx2": AVX2,
    "bf16_avx2": AVX2,
    "route": AVX512,
    "f32": AVX512,
    "bf16": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
# What they find stops the process; the header shows them the instructions that they cannot see.
SANITIZERS = (
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1",
    "-include", str(SOURCES / "sanitize.h"),
)  # fmt: skip
MODES = ("auto", "off", "require")
COMPILE_SECONDS = 300
PREFIX = "compiling-"  # of folders in the cache
CAPS = ("avx2", "avx512", "amx")  # values of FLEXPERT_INSTRUCTIONS, each more than the one before

_log = logging.getLogger("flexpert")


class BuildError(Exception):
    """Why there is no native library, in one line."""


@dataclass(frozen=True)
class Native:
    """The loaded library, or why there is none; what probe.cpp finds in the processor; the most to use."""

    library: ctypes.CDLL | None
    reason: str
    avx2: bool = False
    avx512: bool = False
    avx512_bf16: bool = False
    amx: bool = False
    cap: str = CAPS[-1]

    def instructions(self, dtype: torch.dtype) -> str:
        """What kernels of that dtype compute with: "AVX2", "AVX-512", "AVX512_BF16" or "AMX"."""
        if self.cap == "avx2" or not self.avx512:
            return "AVX2"
        if dtype != torch.bfloat16:
            return "AVX-512"
        if not self.avx512_bf16:
            return "AVX2"
        return "AMX" if self.amx and self.cap == "amx" else "AVX512_BF16"


def mode() -> str:
    """FLEXPERT_NATIVE: "auto" (the default), "off", or "require": an error instead of the portable path.

    Raises:
        ConfigError: another value.
    """
    value = os.environ.get("FLEXPERT_NATIVE") or "auto"
    if value not in MODES:
        raise ConfigError(f"FLEXPERT_NATIVE={value!r} is unknown; choose one of: {', '.join(MODES)}")
    return value


def cap() -> str:
    """FLEXPERT_INSTRUCTIONS: the most that kernels may use, "avx2", "avx512" or "amx" (the default).

    Raises:
        ConfigError: another value.
    """
    value = os.environ.get("FLEXPERT_INSTRUCTIONS") or CAPS[-1]
    if value not in CAPS:
        raise ConfigError(f"FLEXPERT_INSTRUCTIONS={value!r} is unknown; choose one of: {', '.join(CAPS)}")
    return value


def sanitizers() -> tuple[str, ...]:
    """The flags FLEXPERT_SANITIZE=1 adds, for the tests of `./run sanitize`; none otherwise."""
    return SANITIZERS if os.environ.get("FLEXPERT_SANITIZE", "0") not in ("", "0") else ()


def cache_folder() -> Path:
    """$FLEXPERT_CACHE, else `flexpert` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ConfigError: none of them is known.
    """
    if chosen := os.environ.get("FLEXPERT_CACHE"):
        return Path(chosen).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "flexpert"
    except RuntimeError as error:
        raise ConfigError("no place for the cache, as this user has no home; set FLEXPERT_CACHE") from error


def find_compiler() -> list[str]:
    """The command of $CXX, else of g++, c++ or clang++.

    Raises:
        BuildError: there is none.
    """
    text = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(text)
    except ValueError as error:
        raise BuildError(f"no C++ compiler: CXX={text!r} is not a command: {error}") from error
    if chosen:
        if (found := shutil.which(chosen[0])) is None:
            raise BuildError(f"no C++ compiler: CXX={chosen[0]!r} is not a command")
        return [str(Path(found).absolute()), *chosen[1:]]  # as it is run from another folder
    for name in ("g++", "c++", "clang++"):
        if found := shutil.which(name):
            return [str(Path(found).absolute())]
    raise BuildError("no C++ compiler: install g++ or set CXX")


def _run(command: list[str], folder: Path) -> str:
    # In English, and with room for what compilers put aside: elsewhere there may be none.
    env = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)}
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, encoding="utf-8", errors="replace",
            timeout=COMPILE_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler failed: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"the C++ compiler failed: {first.strip()}")
    return done.stdout


def _key(compiler: list[str]) -> str:
    digest = hashlib.sha256()
    version = _run([*compiler, "--version"], SOURCES)
    for text in (torch.__version__, " ".join(compiler), version, repr((FLAGS, UNITS, sanitizers()))):
        digest.update(text.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its holder."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(compiler: list[str], target: Path) -> None:
    """Under the lock: whoever left a folder here was killed."""
    for left in target.parent.glob(f"{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=target.parent) as name:
        folder = Path(name)

        def compiled(unit: str) -> str:
            source, made = SOURCES / f"{unit.removesuffix('_avx2')}.cpp", str(folder / f"{unit}.o")
            _run([*compiler, *FLAGS, *UNITS[unit], *sanitizers(), "-c", str(source), "-o", made], folder)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, UNITS))
        made = folder / target.name
        _run([*compiler, *sanitizers(), "-shared", *objects, "-o", str(made)], folder)
        if not made.exists():
            raise BuildError(f"the C++ compiler failed: {shlex.join(compiler)} wrote no library")
        seal(made, target.name)
        made.replace(target)


def target_path(compiler: list[str]) -> Path:
    """Where the library of these sources, compiler, flags and PyTorch is or would be.

    Raises:
        BuildError: the compiler does not tell its version, or there is no place for a cache.
    """
    try:
        folder = cache_folder()
    except ConfigError as error:
        raise BuildError(str(error)) from error
    return folder / "native" / f"flexpert-{_key(compiler)}.so"


def build(force: bool = False) -> Path:
    """The path of the library, compiled if it is not in the cache, damaged there, or `force` is set.

    Raises:
        BuildError: this machine or its compiler cannot.
    """
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "AMD64"):
        raise BuildError(f"no native kernels for {system} on {machine}, only for Linux on x86_64")
    compiler = find_compiler()
    target = target_path(compiler)
    folder = target.parent
    if is_whole(target) and not force:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if force or not is_whole(target):
                _log.info("compiling the native CPU kernels into %s (once, some seconds)", folder)
                _compile(compiler, target)
    except OSError as error:
        raise BuildError(f"cannot write to the cache {folder}: {error.strerror or error}") from error
    return target


def load(path: Path) -> Native:
    """The library of that path, and what it finds in the processor.

    Raises:
        BuildError: it cannot be loaded, or not be run by this processor.
        ConfigError: FLEXPERT_INSTRUCTIONS is unknown.
    """
    if sanitizers() and "libasan" not in Path("/proc/self/maps").read_text():
        raise BuildError("FLEXPERT_SANITIZE needs libasan.so in LD_PRELOAD; `./run sanitize` sets it")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}") from error
    features = library.flexpert_features
    features.restype = ctypes.c_int64
    bits = features()
    if not bits & 8:
        raise BuildError("the native kernels need AVX2 and FMA, which this processor has not")
    return Native(library, "", True, bool(bits & 1), bool(bits & 2), bool(bits & 4), cap())


_native: Native | None = None


def native() -> Native:
    """The library of this process: built and loaded at the first call, never at import.

    Raises:
        ConfigError: FLEXPERT_NATIVE is "require" and there is no library, or is no mode;
            FLEXPERT_INSTRUCTIONS is unknown.
    """
    global _native  # noqa: PLW0603
    if _native is None:
        chosen = mode()
        if chosen == "off":
            _native = Native(None, "turned off by FLEXPERT_NATIVE=off")
        else:
            try:
                _native = load(build())
            except BuildError as error:
                if chosen == "require":
                    raise ConfigError(f"FLEXPERT_NATIVE=require, but {error}") from error
                _log.warning("native CPU kernels are off, PyTorch's operators run instead: %s", error)
                _native = Native(None, str(error))
    return _native
