"""`flexpert doctor`: what works on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch

import flexpert
from flexpert import ops

NAME = "doctor"
HELP = "Show which operators and optional packages are live on this machine, and why others are not."
EXAMPLES = ("flexpert doctor", "flexpert doctor --json")

OPTIONAL = {
    "transformers": ("vision", "SwinV2-MoE, Hugging Face models"),
    "tensorboard": ("tb", "TensorBoard events of a run"),
    "matplotlib": ("plots", "learning curve and load heat map"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""
    del parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Facts about the machine, operators and packages."""
    del options
    return {
        "flexpert": flexpert.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "operators": ops.report(),
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
            "operators:",
            *(_operator_line(row) for row in result["operators"]),
            "",
            "optional packages:",
            *(_package_line(row) for row in result["packages"]),
        ]
    )


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
