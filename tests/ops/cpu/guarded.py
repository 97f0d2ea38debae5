"""Calls whose every input and output ends, or begins, at memory that may not be touched: who does is killed.

Runs as a program of its own: `python -m tests.ops.cpu.guarded float32`. Outputs begin as NaN. The results
must have the bits of the same call on ordinary memory.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexpert import ops
from flexpert.ops import select
from tests.ops.conftest import build_case

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip
NO_ACCESS = 0
_protect = ctypes.CDLL(None, use_errno=True).mprotect
_protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def fenced(like: Tensor, at_end: bool) -> Tensor:
    """A tensor of its shape and dtype, full of NaN, between two pages that may not be touched."""
    size = like.numel() * like.element_size()
    if size == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    page = mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    memory[page : page + room] = b"\xff" * room
    start = page + room - size if at_end else page
    tensor = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=start).view(like.shape)
    for fence in (tensor.data_ptr() - start, tensor.data_ptr() - start + page + room):
        if _protect(fence, page, NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    return tensor


class FencedOutputs(TorchDispatchMode):
    """Memory that kernels ask for is fenced."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end, self.made = at_end, set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            result = fenced(result, self.at_end)
            self.made.add(result.data_ptr())
        return result


def run(case, dy, needs=(True,) * 6):
    """All that the kernels return, and y of a call that saves nothing for backward."""
    dtype = case.x_TD.dtype
    forward, backward, again = (
        select.kernel(name, "cpu", dtype)
        for name in ("grouped_mlp", "grouped_mlp_backward", "grouped_mlp_pre")
    )
    with torch.no_grad():
        alone, _ = forward(*case.args, False)
        y, pre = forward(*case.args, True)
        grads = backward(dy, pre, *case.args[:6], case.w2, case.b2, case.activation, list(needs))
        pre_again = again(case.x_TD, case.unit_N, case.counts_E, case.slot_E, case.w1, case.b1)
    return [alone, y, pre, pre_again, *grads]


def check(case, at_end):
    dy = torch.randn(len(case.x_TD), case.w2.shape[1]).to(case.x_TD.dtype)
    want = run(case, dy)
    copies = {}
    for name, value in vars(case).items():
        if isinstance(value, Tensor):
            copies[name] = fenced(value, at_end).copy_(value.detach())
    mode = FencedOutputs(at_end)
    with mode:
        got = run(replace(case, **copies), fenced(dy, at_end).copy_(dy))
    for mine, true in zip(got, want, strict=True):
        assert mine.numel() == 0 or mine.data_ptr() in mode.made, "not in memory that was poisoned"
        assert torch.equal(mine, true)


def main(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = ((1, 1, 1), (7, 17, 33), (33, 7, 1), (17, 255, 7), (64, 32, 96), (255, 33, 40), (31, 65, 127))
    done = 0
    with ops.use_backend("native"):
        for (d, f, o), gated, at_end in product(sizes, (False, True), (False, True)):
            for tokens, counts, slots in (
                (1, (1,), None),
                (9, (3, 0, 33, 1), None),
                (9, (0, 8, 0), None),
                (5, (2, 8, 40, 3), (0, -1, 1, 0)),
                (70, (64, 65), (1, 0)),
            ):
                case = build_case(
                    tokens=tokens, model_dim=d, hidden_dim=f, output_dim=o, counts=counts, slots=slots,
                    gated=gated, spare=done % 3, weighted=done % 5 > 0,
                    biases=(True, "b1", "b2", False)[done % 4], dtype=dtype,
                )  # fmt: skip
                check(case, at_end)
                done += 1
    print(done, "calls")


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
