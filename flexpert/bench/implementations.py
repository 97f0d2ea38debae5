"""What is compared: each builds, from a problem, a function of no arguments that returns the layer's output.

All start from the same expert ids, weights and drops, and sort or group by themselves; whole layers alone
also run their router. "dense" is no layer: the same useful FLOPs as two plain products of large matrices.
"stream" is none either: a plain read of as many bytes as the experts that are touched have.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert import ops
from flexpert.core.config import MoEConfig
from flexpert.experts import prepack
from flexpert.layer import MoE
from flexpert.ops import packing
from flexpert.ops.memory import prefer_huge_pages

from .problem import Problem

Step = Callable[[], Tensor]
FORWARD, TRAINING, DECODE = "forward", "forward+backward", "decode"
# What another package may fail with, when it is imported or given a shape it does not take.
FAILURES = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, OSError,
)  # fmt: skip
LARGEST_DISPATCH = 2**28  # elements of a (T, E, C) tensor


class UnavailableError(Exception):
    """Why an implementation does not run a problem, in one line."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to run a problem.

    Attributes:
        name: as it is asked for and reported.
        make: builds the step; raises `UnavailableError` for problems that it cannot run.
        modes: in which it is measured.
        modules: of other packages, imported before anything is built.
        backend: of our operators, forced while it runs.
    """

    name: str
    make: Callable[[Problem], Step]
    modes: tuple[str, ...] = (FORWARD, TRAINING, DECODE)
    modules: tuple[str, ...] = ()
    backend: str | None = None

    def load(self) -> None:
        """Import its modules.

        Raises:
            UnavailableError: one is not there, or does not work with what is installed beside it.
        """
        try:
            for module in self.modules:
                importlib.import_module(module)
        except FAILURES as error:
            package = self.modules[0].partition(".")[0]
            raise UnavailableError(f"{package} cannot be imported: {first_line(error)}") from error

    def build(self, problem: Problem) -> Step:
        """The step of a problem.

        Raises:
            UnavailableError: it cannot run here, or cannot run this problem.
        """
        self.load()
        return self.make(problem)

    def context(self) -> AbstractContextManager[None]:
        """In which all of it has to run, backward included."""
        return nullcontext() if self.backend is None else ops.use_backend(self.backend)


def first_line(error: BaseException) -> str:
    """What an error of someone else says first."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def hidden_of(problem: Problem, pre: Tensor) -> Tensor:
    """Activation, and the gate of a GLU, of pre-activations (..., F or 2F)."""
    act = ops.get_activation(problem.shape.activation).forward
    if not problem.shape.gated:
        return act(pre)
    gate, up = pre.chunk(2, dim=-1)
    return act(gate) * up


def _sorted(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(index into the flattened assignments, unit, counts) of the kept rows, by expert."""
    flat = problem.id_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=problem.shape.num_experts + 1)[: problem.shape.num_experts]
    order = order[: int(counts.sum())]
    return order, order // problem.shape.top_k, counts


def fused(problem: Problem) -> Step:
    """`flexpert.ops.chosen_mlp`: `assign` and the fused `grouped_mlp`, of few tokens in one call."""
    experts = ops.ExpertMLP(problem.w1, None, problem.w2, None, problem.shape.activation)
    return lambda: ops.chosen_mlp(problem.x_TD, problem.id_TK, problem.weight_TK, experts)


def in_order(problem: Problem) -> Step:
    """The fused operator on rows that lie in the order of their experts and stay there: the experts alone.

    No router, no gather and no sum over the rows of a token; runs its own backward.
    """
    _, unit, counts = _sorted(problem)
    rows = problem.x_TD.detach().index_select(0, unit).requires_grad_()
    every, grad = torch.arange(len(unit)), problem.grad_TD.index_select(0, unit)
    weights = problem.w1, None, problem.w2, None, problem.shape.activation

    def step() -> Tensor:
        rows.grad = None
        out = ops.grouped_mlp(rows, every, None, counts, None, *weights)
        if out.requires_grad:
            out.backward(grad)
        return out.detach()

    return step


def prepacked(problem: Problem) -> Step:
    """`fused` with weights in the layout of the kernels: `flexpert.prepack`."""
    shape = problem.shape
    if (reason := packing.why_not(problem.w1.device, problem.dtype)) is not None:
        raise UnavailableError(reason)
    w1, w2 = packing.pack_mlp(problem.w1.detach(), problem.w2.detach())
    for packed in (w1, w2):
        prefer_huge_pages(packed)
    sizes = shape.hidden_dim, shape.model_dim
    experts = ops.ExpertMLP(w1, None, w2, None, shape.activation, packed=sizes)
    return lambda: ops.chosen_mlp(problem.x_TD, problem.id_TK, problem.weight_TK, experts)


def layer(problem: Problem) -> Step:
    """A whole `flexpert.MoE`, router included, with the problem's parameters."""
    moe = make_layer(problem)
    return lambda: moe(problem.x_TD)


def make_layer(problem: Problem) -> MoE:
    """In eval mode, sharing the problem's parameters."""
    shape = problem.shape
    config = MoEConfig(
        model_dim=shape.model_dim,
        hidden_dim=shape.hidden_dim,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        expert="glu" if shape.gated else "mlp",
        activation=shape.activation,
        capacity_factor=shape.capacity_factor,
    )
    with torch.device("meta"):
        moe = MoE(config).to(problem.dtype)
    parameters = {"router.weight": problem.router_ED, "experts.w1": problem.w1, "experts.w2": problem.w2}
    moe.load_state_dict(parameters, assign=True)
    return moe.eval()


def prepacked_layer(problem: Problem) -> Step:
    """`layer` after `flexpert.prepack`."""
    moe = make_layer(problem)
    if (reason := prepack(moe)["experts"]) is not None:
        raise UnavailableError(reason)
    return lambda: moe(problem.x_TD)


def dense(problem: Problem) -> Step:
    """(N, D) @ (D, F or 2F) and (N, F) @ (F, D): the products alone, on matrices that are ready."""
    rows, shape = problem.rows, problem.shape
    wide = problem.w1.detach()[0].flatten(0, -2)
    x = torch.randn(rows, shape.model_dim).to(problem.dtype).requires_grad_()
    h = torch.randn(rows, shape.hidden_dim).to(problem.dtype).requires_grad_()
    w1, w2 = wide.clone().requires_grad_(), problem.w2.detach()[0].clone().requires_grad_()
    grads = torch.randn(rows, len(w1)).to(problem.dtype), torch.randn(rows, len(w2)).to(problem.dtype)

    def step() -> Tensor:
        for leaf in (x, h, w1, w2):
            leaf.grad = None
        outputs = torch.mm(x, w1.t()), torch.mm(h, w2.t())
        if torch.is_grad_enabled():
            torch.autograd.backward(outputs, grads)
        return outputs[1].detach()

    return step


def stream(problem: Problem) -> Step:
    """The faster of two reads of `problem.touched_bytes`: their sum, or their product with a vector."""
    width = 1024
    buffer = torch.randn(-(-problem.touched_bytes // (4 * width)), width)
    vector = torch.randn(width)

    def read_sum() -> Tensor:
        return buffer.sum()

    def read_product() -> Tensor:
        return torch.mv(buffer, vector)

    def fastest(read: Step) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            read()
            times.append(time.perf_counter() - start)
        return min(times)

    return min((read_sum, read_product), key=fastest)


def sort_loop(problem: Problem) -> Step:
    """argsort, index_select, one product per expert, weighted index_add."""

    def step() -> Tensor:
        order, unit, counts = _sorted(problem)
        rows = problem.x_TD.index_select(0, unit)
        outputs = []
        parts = rows.split(counts.tolist()), problem.w1.flatten(1, -2).unbind(), problem.w2.unbind()
        for part, w1, w2 in zip(*parts, strict=True):
            if len(part):
                outputs.append(hidden_of(problem, part @ w1.t()) @ w2.t())
        weight = problem.weight_TK.reshape(-1)[order, None]
        weighted = (torch.cat(outputs) * weight).to(problem.dtype)
        return torch.zeros_like(problem.x_TD).index_add(0, unit, weighted)

    return step


def grouped_mm(problem: Problem) -> Step:
    """argsort, index_select, two `F.grouped_mm`, weighted index_add."""
    if not hasattr(F, "grouped_mm"):
        raise UnavailableError(f"PyTorch {torch.__version__} has no torch.nn.functional.grouped_mm")

    def step() -> Tensor:
        order, unit, counts = _sorted(problem)
        offsets = counts.cumsum(0).to(torch.int32)
        rows = problem.x_TD.index_select(0, unit)
        pre = F.grouped_mm(rows, problem.w1.flatten(1, -2).transpose(1, 2), offs=offsets)
        out = F.grouped_mm(hidden_of(problem, pre), problem.w2.transpose(1, 2), offs=offsets)
        weight = problem.weight_TK.reshape(-1)[order, None]
        return torch.zeros_like(problem.x_TD).index_add(0, unit, (out * weight).to(problem.dtype))

    return step


def through_buffers(problem: Problem, dispatch_TEC: Tensor, combine_TEC: Tensor) -> Tensor:
    """GShard's data flow (Lepikhin et al., arXiv 2006.16668, algorithm 1) by dense tensors of places."""
    rows = torch.einsum("tec,td->ecd", dispatch_TEC, problem.x_TD)
    hidden = hidden_of(problem, torch.bmm(rows, problem.w1.flatten(1, -2).transpose(1, 2)))
    out = torch.bmm(hidden, problem.w2.transpose(1, 2))
    return torch.einsum("tec,eco->to", combine_TEC, out)


def einsum(problem: Problem) -> Step:
    """GShard's dense dispatch and combine tensors (T, E, C)."""
    shape = problem.shape
    if shape.capacity is None:
        raise UnavailableError("dispatch by einsum needs a capacity, this configuration is dropless")
    if shape.tokens * shape.num_experts * shape.capacity > LARGEST_DISPATCH:
        raise UnavailableError("its dispatch tensor (T, E, C) would be too large")

    def step() -> Tensor:
        flat = problem.id_TK.reshape(-1)
        hot = F.one_hot(flat, shape.num_experts + 1)[:, : shape.num_experts]
        rank = ((hot.cumsum(0) - 1) * hot).sum(1)
        slot = F.one_hot(rank, int(hot.sum(0).max())).to(problem.dtype)
        hot = hot.to(problem.dtype).view(shape.tokens, shape.top_k, -1)
        slot = slot.view(shape.tokens, shape.top_k, -1)
        weight = problem.weight_TK.to(problem.dtype)
        combine = torch.einsum("tk,tke,tkc->tec", weight, hot, slot)
        dispatch = torch.einsum("tke,tkc->tec", hot, slot)
        return through_buffers(problem, dispatch, combine)

    return step


OURS = (
    Implementation(name="flexpert", make=fused),
    Implementation(name="flexpert prepacked", make=prepacked, modes=(FORWARD, DECODE)),
    Implementation(name="flexpert rows", make=in_order, modes=(FORWARD, TRAINING)),
    Implementation(name="flexpert layer", make=layer),
    Implementation(name="flexpert prepacked layer", make=prepacked_layer, modes=(FORWARD, DECODE)),
    Implementation(name="flexpert portable", make=fused, backend="portable"),
)
REFERENCES = (
    Implementation(name="dense", make=dense, modes=(FORWARD, TRAINING)),
    Implementation(name="stream", make=stream, modes=(DECODE,)),
)
PLAIN = (
    Implementation(name="sort + loop", make=sort_loop),
    Implementation(name="F.grouped_mm", make=grouped_mm),
    Implementation(name="einsum", make=einsum, modes=(FORWARD, TRAINING)),
)
