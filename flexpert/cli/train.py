"""`flexpert train`: train a model from a configuration, or go on with a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from flexpert.train.config import load_config

NAME = "train"
HELP = "Train a model from a YAML configuration; settings may be changed as key=value."
EXAMPLES = (
    "flexpert train configs/fashion_mnist.yaml",
    "flexpert train configs/fashion_mnist.yaml optimizer.epochs=2 seed=1 name=short",
    "flexpert train configs/fashion_mnist.yaml model.num_experts=0 name=dense-twin",
    "flexpert train configs/python_lm.yaml",
    "flexpert train configs/fashion_mnist.yaml --resume",
    "flexpert train configs/fashion_mnist.yaml ranks=2 parallel.plan.degree=2",
    "torchrun --nproc-per-node 2 --max-restarts 3 -m flexpert.train configs/fashion_mnist.yaml",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Configuration, overrides, --resume."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run of this name from its newest checkpoint"
    )


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Train; the summary of the run, None where the processes that were started have told it."""
    from flexpert.train.job import train
    from flexpert.train.launch import launch
    from flexpert.train.world import read_world

    config = load_config(options.config, options.overrides)
    if config.ranks in (None, 1) or read_world().size > 1:
        return train(config, resume=options.resume)
    flags = [flag for flag in ("resume", "json") if getattr(options, flag)]
    arguments = [str(options.config), *options.overrides, *(f"--{flag}" for flag in flags)]
    launch([sys.executable, "-m", "flexpert", NAME, *arguments], config.ranks)
    return None


def describe(result: dict[str, Any]) -> str:
    """The summary as text."""
    run_folder, text = result["run"], "sample" in result
    lines = [
        "",
        f"{result['headline']}, after {result['steps']} steps in {result['seconds'] / 60:.1f} minutes",
        "",
        *(["a sample:", "", *(f"  {line}" for line in result["sample"].splitlines()), ""] if text else []),
        f"  model          {run_folder}/model   (safetensors, config.json, README.md)",
        f"  metrics        {run_folder}/metrics.jsonl, {run_folder}/tensorboard",
        f"  settings       {run_folder}/config.yaml",
        f"  checkpoints    {run_folder}/checkpoints",
        *(f"  plot           {path}" for path in result["plots"]),
        "",
        "try next:",
        *([f"  flexpert generate {run_folder} --prompt 'import '"] if text else []),
        f"  flexpert evaluate {run_folder}",
        f"  flexpert evaluate {run_folder} capacity_factor=0.5 top_k=2",
        f"  tensorboard --logdir {run_folder}/tensorboard",
    ]
    return "\n".join(lines)
