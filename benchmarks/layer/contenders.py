"""What is compared: each builds, from a problem, a function of no arguments that returns the layer's output.

All start from the same expert ids, weights and drops, and sort or group by themselves; the whole layer alone
also runs its router. "dense" is no layer: the same useful FLOPs as two plain products of large matrices.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert import MoEConfig, ops

from .problem import Problem

Step = Callable[[], Tensor]

PLAIN = {"gelu": F.gelu, "silu": F.silu}


def _hidden(problem: Problem, pre: Tensor) -> Tensor:
    act = PLAIN[problem.shape.activation]
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


def ours(problem: Problem) -> Step:
    """`flexpert.ops.assign` and the fused `flexpert.ops.grouped_mlp`."""
    shape = problem.shape

    def step() -> Tensor:
        order, counts = ops.assign(problem.id_TK.reshape(-1), shape.num_experts)
        weight = problem.weight_TK.reshape(-1)[order]
        return ops.grouped_mlp(
            problem.x_TD, order // shape.top_k, weight, counts, None,
            problem.w1, None, problem.w2, None, shape.activation,
        )  # fmt: skip

    return step


def layer(problem: Problem) -> Step:
    """A whole `flexpert.MoE`, router included, with the problem's expert weights."""
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
        moe = config.build()
    moe = moe.to(problem.dtype)
    parameters = {"router.weight": problem.router_ED, "experts.w1": problem.w1, "experts.w2": problem.w2}
    return lambda: torch.func.functional_call(moe, parameters, (problem.x_TD,))


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


def sort_loop(problem: Problem) -> Step:
    """argsort, index_select, one product per expert, weighted index_add."""

    def step() -> Tensor:
        order, unit, counts = _sorted(problem)
        rows = problem.x_TD.index_select(0, unit)
        outputs = []
        parts = rows.split(counts.tolist()), problem.w1.flatten(1, -2).unbind(), problem.w2.unbind()
        for part, w1, w2 in zip(*parts, strict=True):
            outputs.append(_hidden(problem, part @ w1.t()) @ w2.t())
        weight = problem.weight_TK.reshape(-1)[order, None]
        weighted = (torch.cat(outputs) * weight).to(problem.dtype)
        return torch.zeros_like(problem.x_TD).index_add(0, unit, weighted)

    return step


def grouped_mm(problem: Problem) -> Step:
    """argsort, index_select, two `F.grouped_mm`, weighted index_add."""

    def step() -> Tensor:
        order, unit, counts = _sorted(problem)
        offsets = counts.cumsum(0).to(torch.int32)
        rows = problem.x_TD.index_select(0, unit)
        pre = F.grouped_mm(rows, problem.w1.flatten(1, -2).transpose(1, 2), offs=offsets)
        out = F.grouped_mm(_hidden(problem, pre), problem.w2.transpose(1, 2), offs=offsets)
        weight = problem.weight_TK.reshape(-1)[order, None]
        return torch.zeros_like(problem.x_TD).index_add(0, unit, (out * weight).to(problem.dtype))

    return step


def transformers(problem: Problem) -> Step | None:
    """The experts forward "grouped_mm" of transformers 5; None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers.integrations.moe import grouped_mm_experts_forward

    shape = problem.shape
    experts = SimpleNamespace(
        num_experts=shape.num_experts,
        has_gate=shape.gated,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        _is_expert_parallel=shape.capacity_factor is not None,  # dropped assignments carry a sentinel id
        act_fn=PLAIN[shape.activation],
        _apply_gate=lambda pre: _hidden(problem, pre),
        gate_up_proj=None,
        up_proj=None,
        down_proj=problem.w2,
    )

    def step() -> Tensor:
        flat = problem.w1.flatten(1, -2)
        experts.gate_up_proj = experts.up_proj = flat
        return grouped_mm_experts_forward(experts, problem.x_TD, problem.id_TK, problem.weight_TK)

    return step


def einsum(problem: Problem) -> Step | None:
    """GShard's dense dispatch and combine tensors (T, E, C); not run where they outgrow the experts' work."""
    shape = problem.shape
    if shape.capacity_factor is None:
        return None

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
        rows = torch.einsum("tec,td->ecd", dispatch, problem.x_TD)
        hidden = _hidden(problem, torch.bmm(rows, problem.w1.flatten(1, -2).transpose(1, 2)))
        out = torch.bmm(hidden, problem.w2.transpose(1, 2))
        return torch.einsum("tec,eco->to", combine, out)

    return step


CONTENDERS: dict[str, Callable[[Problem], Step | None]] = {
    "ours": ours,
    "ours, whole layer": layer,
    "dense": dense,
    "sort + loop": sort_loop,
    "F.grouped_mm": grouped_mm,
    "transformers": transformers,
    "einsum": einsum,
}
