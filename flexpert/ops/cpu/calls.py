"""A call into the library: checked, and its status turned into an error."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from flexpert.core.errors import FlexpertError, InputError

from .build import native

_functions: dict[tuple[str, str], Callable[..., int]] = {}


def check(name: str, **shapes: tuple[Tensor, tuple[int, ...], torch.dtype]) -> None:
    """Kernels trust sizes: what PyTorch's operators would refuse is refused here."""
    for tensor_name, (tensor, shape, dtype) in shapes.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise InputError(
                f"{name}: {tensor_name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {tuple(shape)}"
            )
        if not tensor.is_cpu:
            raise InputError(f"{name}: {tensor_name} is on {tensor.device}, the other tensors are on cpu")


def run(name: str, call: bytes, *flags: int, refusal: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Call the library's function of that name, made for what the processor has for `dtype`.

    Raises:
        InputError: the library refuses the numbers in its arguments, in the words of `refusal`.
    """
    uses = native().instructions(dtype)
    function = _functions.get((name, uses))
    if function is None:
        function = getattr(native().library, f"flexpert_{name}{'_avx2' if uses == 'AVX2' else ''}")
        function.argtypes = (ctypes.c_char_p, *[ctypes.c_int64] * len(flags))
        function.restype = ctypes.c_int64
        _functions[name, uses] = function
    status = function(call, *flags)
    if status == 1:
        raise FlexpertError(f"{name}: not enough memory")
    if status:
        raise InputError(f"{name}: {refusal}")
