"""The facts of the machine that a reader needs to compare figures with another's."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import flexpert.ops.cpu.build as native
from flexpert import ops
from flexpert.ops.cpu.processor import processor

from .problem import DTYPES

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")


def backends() -> dict[str, str]:
    """The live backend of the fused operator by dtype; builds the native library where it is wanted."""
    return {
        name: row["backend"]
        for name, dtype in DTYPES.items()
        for row in ops.report(dtype=dtype)
        if row["operator"] == "grouped_mlp" and row["live"]
    }


def has_fast_bf16() -> bool:
    """Whether products in bf16 are no slower than in fp32 here."""
    return bool(processor()[1] & {"avx512_bf16", "amx_bf16", "bf16"})


def machine_facts() -> dict[str, Any]:
    """Processor, threads, load, versions, backends."""
    name, flags = processor()
    return {
        "cpu": name,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "native": native.mode(),
        "backends": backends(),
    }
