"""What a backend is: a name, a table of kernels, and why it refuses a kind of call.

Kernels live below autograd: they get the arguments of the `flexpert::` schemas and return what those declare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Kernel = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What a backend may judge a call by; `dtype` is that of the first tensor."""

    operator: str
    device: str
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Backend:
    """`verify` returns None where the backend can run the call, else the reason why it cannot.

    `instructions` names what it then computes with, where it is not PyTorch that decides.
    """

    name: str
    kernels: Mapping[str, Kernel]
    verify: Callable[[CallFacts], str | None]
    instructions: Callable[[CallFacts], str] | None = None
