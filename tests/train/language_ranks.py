"""The language job on ranks; run by name, and without ranks as the reference."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from flexpert.train.config import load_config
from flexpert.train.job import train

CONFIG = Path(__file__).parents[2] / "configs" / "python_lm.yaml"


def run(settings, resume=False):
    """The whole job; what it returns."""
    names = {}
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update(names)
    try:
        return train(load_config(CONFIG, settings), resume=resume)
    finally:
        for name in names:
            del os.environ[name]
