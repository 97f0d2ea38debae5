"""The parts of a layer on this machine: how long each takes alone, by the kernels' own functions.

Work, bytes and times are those of one pass over a problem of the benchmark. A product comes with the epilogue
that takes its sums up; what is neither is packing, or a sum over the rows of a token.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexpert import ops
from flexpert.bench.problem import DTYPES, Problem
from flexpert.ops.cpu import build
from flexpert.ops.cpu.layer import NUMBER
from flexpert.ops.memory import empty, prefer_huge_pages

BLOCK = 32
UNITS = {"fp32": ("f32", "block_f32.h"), "bf16": ("bf16", "block_bf16.h")}
# Of csrc/case.h.
FIELDS = (
    "units", "rows", "model", "hidden", "experts", "gated", "activation", "threads", "amx", "tiles",
    "x", "unit", "counts", "weight", "w1", "w2", "grad", "pre", "y_rows", "y", "d_w1", "d_w2", "near",
)  # fmt: skip
AREAS, PANEL = 6, 16  # areas of each thread; the widest panel in column blocks
# Of csrc/products.h.
PRODUCT, EPILOGUE, ON_MEMORY, BOTH, ASKING = range(5)
NEAR, FAR = range(2)  # operands of a move
Run = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of work of a pass.

    Attributes:
        function: of the library.
        title: for people.
        flops: of its product; 0 where there is none.
        read, written: bytes of memory, rather than of what lies near, those of weights included.
        weights: of these the bytes of weights or of their gradients.
    """

    function: str
    title: str
    flops: int = 0
    read: int = 0
    written: int = 0
    weights: int = 0


def compile_parts(dtype: str, folder: Path) -> ctypes.CDLL:
    """The library of the parts in a dtype, compiled into the folder."""
    unit, header = UNITS[dtype]
    source, library = Path(__file__).parent / "csrc" / "parts.cpp", folder / f"parts_{dtype}.so"
    compiler, made = build.find_compiler(), str(folder / f"parts_{dtype}.o")
    flags = [*build.FLAGS, *build.UNITS[unit], "-I", str(build.SOURCES), f'-DBLOCK_HEADER="{header}"']
    subprocess.run([*compiler, *flags, "-c", str(source), "-o", made], check=True)
    # Without OpenMP's library: its symbols bind to the runtime of PyTorch.
    subprocess.run([*compiler, "-shared", made, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def parts_of(problem: Problem, *, trains: bool, packed: bool) -> list[Part]:
    """The parts of a pass: forward, of packed weights where `packed`; or forward and backward."""
    shape, item, rows = problem.shape, problem.dtype.itemsize, problem.rows
    model, inner = shape.model_dim, shape.hidden_dim * (2 if shape.gated else 1)
    w1, w2 = problem.w1.numel() * item, problem.w2.numel() * item
    tokens, results, saved = problem.x_TD.numel() * item, rows * model * item, rows * inner * item
    first, second = 2 * rows * model * inner, 2 * rows * model * shape.hidden_dim
    parts = [
        Part(function="pack_tokens", title="packing the tokens' rows", read=tokens),
        Part(function="first_product", title="first product", flops=first, written=saved if trains else 0),
        Part(function="second_product", title="second product", flops=second, written=results),
        Part(function="sums", title="sums per token", read=results, written=tokens),
    ]
    if not packed:
        parts += [
            Part(function="pack_first", title="packing w1", read=w1, weights=w1),
            Part(function="pack_second", title="packing w2", read=w2, weights=w2),
        ]
    if trains:
        parts += [
            Part(function="pack_gradients", title="packing dy and x", read=2 * tokens),
            Part(function="pack_second_of_k", title="packing w2 for backward", read=w2, weights=w2),
            Part(function="pack_first_of_k", title="packing w1 for backward", read=w1, weights=w1),
            Part(function="hidden_gradient", title="gradient of the hidden layer", flops=second, read=saved),
            Part(function="row_gradient", title="gradient of the rows", flops=first, written=results),
            Part(function="second_gradient", title="gradient of w2", flops=second, written=w2, weights=w2),
            Part(function="first_gradient", title="gradient of w1", flops=first, written=w1, weights=w1),
            Part(function="sums", title="sums per token, backward", read=results, written=tokens),
        ]
    return parts


class Parts:
    """Runs of the parts of one problem, each of which returns its seconds.

    The widths have to be multiples of 32.

    Args:
        library: of the problem's dtype.
        problem: whose tensors are read.
        trains: forward saves the pre-activation, and there are gradients of the weights.
    """

    def __init__(self, library: ctypes.CDLL, problem: Problem, *, trains: bool) -> None:
        shape, threads = problem.shape, torch.get_num_threads()
        if shape.model_dim % BLOCK or shape.hidden_dim % BLOCK:
            raise ValueError(f"D {shape.model_dim}, F {shape.hidden_dim}: expected multiples of {BLOCK}")
        self.library, self.problem, self.threads = library, problem, threads
        order_N, counts_E = ops.assign(problem.id_TK.T.reshape(-1), shape.num_experts)
        weight_N = problem.weight_TK.detach().T.reshape(-1)[order_N].float()
        wide = max(shape.model_dim, shape.hidden_dim * (2 if shape.gated else 1)) // BLOCK
        tiles = wide * max(-(-int(counts_E.max()) // BLOCK), PANEL)
        for weight in (problem.w1, problem.w2):
            prefer_huge_pages(weight)
        tensors = {
            "x": problem.x_TD, "unit": order_N % shape.tokens, "counts": counts_E, "weight": weight_N,
            "w1": problem.w1, "w2": problem.w2, "grad": problem.grad_TD,
            "pre": self._like(len(order_N), problem.w1[0].numel() // shape.model_dim) if trains else None,
            "y_rows": self._like(len(order_N), shape.model_dim), "y": self._like(*problem.x_TD.shape),
            "d_w1": self._like(*problem.w1.shape) if trains else None,
            "d_w2": self._like(*problem.w2.shape) if trains else None,
            "near": self._like(threads, AREAS * tiles * BLOCK * BLOCK).normal_(0, shape.model_dim**-0.25),
        }  # fmt: skip
        values = {
            "units": shape.tokens, "rows": len(order_N), "model": shape.model_dim,
            "hidden": shape.hidden_dim, "experts": shape.num_experts, "gated": int(shape.gated),
            "activation": NUMBER[shape.activation], "threads": threads, "tiles": tiles,
            "amx": int(build.native().instructions(problem.dtype) == "AMX"),
            **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
        }  # fmt: skip
        self.tensors = tensors  # as long as their addresses are used
        self.case = struct.pack(f"={len(FIELDS)}q", *[values[name] for name in FIELDS])

    def _like(self, *shape: int) -> Tensor:
        return empty(self.problem.x_TD.detach(), shape).fill_(1)

    def part(self, function: str, how: int) -> Run:
        """A part, and how it is measured: of a product `PRODUCT` to `ASKING`, else `NEAR` or `FAR`."""
        call = getattr(self.library, f"part_{function}")
        call.argtypes, call.restype = (ctypes.c_char_p, ctypes.c_int64), ctypes.c_double
        return lambda: call(self.case, how)

    def read(self, *tensors: Tensor) -> Run:
        """A plain read."""
        return self._over("read", *tensors)

    def fill(self, *tensors: Tensor) -> Run:
        """A plain fill."""
        return self._over("fill", *tensors)

    def _over(self, function: str, *tensors: Tensor) -> Run:
        call = getattr(self.library, f"part_{function}")
        call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), ctypes.c_double
        return lambda: sum(call(tensor.data_ptr(), tensor.nbytes, self.threads) for tensor in tensors)


def runs_on(dtype: str) -> bool:
    """Whether this machine has the instructions that the parts are compiled for."""
    return build.native().library is not None and build.native().instructions(DTYPES[dtype]) != "AVX2"
