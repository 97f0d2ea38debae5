"""`flexpert doctor`: what works on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
from contextlib import suppress
from typing import Any

import torch

import flexpert
from flexpert import ops
from flexpert.core.errors import ConfigError
from flexpert.ops.cpu import build as native_build
from flexpert.ops.cpu.processor import processor
from flexpert.ops.cpu.seal import is_whole

NAME = "doctor"
HELP = "Show which operators and optional packages are live on this machine, and why others are not."
EXAMPLES = ("flexpert doctor", "flexpert doctor --json")

OPTIONAL = {
    "transformers": ("vision", "SwinV2-MoE, Hugging Face models"),
    "tensorboard": ("tb", "TensorBoard events of a run"),
    "matplotlib": ("plots", "learning curve, load heat map, benchmark plot"),
}
FEATURES = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""
    del parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Facts about the machine, operators and packages."""
    del options
    operators = ops.report()  # builds the native library where FLEXPERT_NATIVE asks for it
    return {
        "flexpert": flexpert.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "processor": _processor(),
        "native": _native(),
        "kernels": [_kernel(dtype) for dtype in DTYPES],
        "operators": operators,
        "packages": [_package(name, extra, use) for name, (extra, use) in OPTIONAL.items()],
    }


def describe(result: dict[str, Any]) -> str:
    """The facts as a page of text."""
    cuda = "yes" if result["cuda"] else "no"
    return "\n".join(
        [
            f"flexpert {result['flexpert']}, Python {result['python']}, torch {result['torch']}",
            f"{result['platform']}, {result['cores']} cores, {result['threads']} threads, "
            f"vector units {result['cpu']}, CUDA {cuda}",
            "",
            *_processor_lines(result["processor"]),
            "",
            *_native_lines(result["native"]),
            "",
            "kernels of the fused MLP:",
            *(_kernel_line(row) for row in result["kernels"]),
            "",
            "operators in float32:",
            *(_operator_line(row) for row in result["operators"]),
            "",
            "optional packages:",
            *(_package_line(row) for row in result["packages"]),
        ]
    )


def _processor() -> dict[str, Any]:
    """Features that kernels ask for; what the library found counts more than what the system lists."""
    name, flags = processor()
    features = {feature: feature in flags if flags else None for feature in FEATURES}
    found, source = native_build.native(), "/proc/cpuinfo" if flags else None
    if found.library is not None:
        source = "the library's probe and /proc/cpuinfo"
        features |= {"avx2": found.avx2, "fma": found.avx2}
        features |= dict.fromkeys(("avx512f", "avx512bw", "avx512dq", "avx512vl"), found.avx512)
        features |= {"avx512_bf16": found.avx512_bf16, "amx_tile": found.amx, "amx_bf16": found.amx}
    return {"name": name, "features": features, "source": source}


def _processor_lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"processor: {facts['name']}"]
    for word, state in (("has", True), ("lacks", False), ("unknown", None)):
        if names := [name for name, present in facts["features"].items() if present is state]:
            lines.append(f"  {word:<16} {', '.join(names)}")
    return [*lines, f"  {'told by':<16} {facts['source'] or 'nobody on this system'}"]


def _native() -> dict[str, Any]:
    """Mode, compiler, cache and library of the native kernels."""
    compiler, problem, library, cache = None, None, None, None
    try:
        compiler = native_build.find_compiler()
        library = native_build.target_path(compiler)
    except native_build.BuildError as error:
        problem = str(error)
    with suppress(ConfigError):
        cache = str(native_build.cache_folder())
    found = native_build.native()
    return {
        "mode": native_build.mode(),
        "cap": native_build.cap(),
        "live": found.library is not None,
        "why_not": found.reason or None,
        "compiler": None if compiler is None else shlex.join(compiler),
        "compiler_problem": problem,
        "cache": cache,
        "library": None if library is None else str(library),
        "built": library is not None and is_whole(library),
    }


def _native_lines(facts: dict[str, Any]) -> list[str]:
    library = facts["library"] if facts["built"] else "not built; flexpert build makes it"
    return [
        f"native CPU kernels: {'live' if facts['live'] else 'not live: ' + facts['why_not']}",
        f"  FLEXPERT_NATIVE        {facts['mode']}",
        f"  FLEXPERT_INSTRUCTIONS  {facts['cap']}",
        f"  compiler               {facts['compiler_problem'] or facts['compiler']}",
        f"  cache                  {facts['cache'] or 'no place for one: set FLEXPERT_CACHE'}",
        f"  library                {library}",
    ]


def _kernel(dtype: torch.dtype) -> dict[str, Any]:
    """The backend that runs the fused MLP in that dtype, what it computes with, and why others do not."""
    rows = [row for row in ops.report(dtype=dtype) if row["operator"] == "grouped_mlp"]
    backend, native = next((row["backend"] for row in rows if row["live"]), None), native_build.native()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend,
        "instructions": native.instructions(dtype) if backend == "native" else "those of PyTorch",
        "why_not": {row["backend"]: row["why"] for row in rows if not row["live"]},
    }


def _kernel_line(row: dict[str, Any]) -> str:
    reasons = "; ".join(f"{name}: {why}" for name, why in row["why_not"].items())
    return f"  {row['dtype']:<10} {row['backend'] or 'none':<10} {row['instructions']} ({reasons})"


def _operator_line(row: dict[str, Any]) -> str:
    state = "live" if row["live"] else "off"
    return f"  {row['operator']:<26} {row['backend']:<10} {state:<5} {row['why']}"


def _package_line(row: dict[str, Any]) -> str:
    state = row["version"] or f"not installed: pip install 'flexpert[{row['extra']}]'"
    return f"  {row['name']:<16} {state} ({row['use']})"


def _package(name: str, extra: str, use: str) -> dict[str, Any]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {"name": name, "version": version, "extra": extra, "use": use}
