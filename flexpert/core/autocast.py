"""Code that runs in the dtypes it is given."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def is_autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on; on the meta device, which PyTorch refuses to tell of, there is none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context without autocast; where there is none it costs nothing."""
    if is_autocast_enabled(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
