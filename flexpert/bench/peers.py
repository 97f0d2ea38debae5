"""Adapters to other packages' expert layers, where these are installed; they are imported when asked for."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert import ops

from .implementations import (
    DECODE,
    FORWARD,
    LARGEST_DISPATCH,
    TRAINING,
    Implementation,
    Step,
    UnavailableError,
    hidden_of,
    through_buffers,
)
from .problem import Problem

VLLM_ACTIVATIONS = ("silu", "gelu")


def transformers_grouped_mm(problem: Problem) -> Step:
    """The experts forward "grouped_mm" of transformers 5."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    shape = problem.shape
    experts: Any = SimpleNamespace(  # what of a module it asks for
        num_experts=shape.num_experts,
        has_gate=shape.gated,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        _is_expert_parallel=shape.capacity_factor is not None,  # dropped assignments carry a sentinel id
        act_fn=ops.get_activation(shape.activation).forward,
        _apply_gate=lambda pre: hidden_of(problem, pre),
        gate_up_proj=None,
        up_proj=None,
        down_proj=problem.w2,
    )

    def step() -> Tensor:
        experts.gate_up_proj = experts.up_proj = problem.w1.flatten(1, -2)
        return grouped_mm_experts_forward(experts, problem.x_TD, problem.id_TK, problem.weight_TK)

    return step


def transformers_eager(problem: Problem) -> Step:
    """Mixtral's experts of transformers 5 in their eager form, a loop over the experts."""
    if not problem.shape.gated:
        raise UnavailableError("the eager experts are gated, this configuration's are not")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    shape = problem.shape
    config = MixtralConfig(
        hidden_size=shape.model_dim, intermediate_size=shape.hidden_dim, num_local_experts=shape.num_experts
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        experts = MixtralExperts(config)
    del experts.act_fn  # a module of its configuration
    experts.act_fn = ops.get_activation(shape.activation).forward

    def step() -> Tensor:
        weights = {"gate_up_proj": problem.w1.flatten(1, 2), "down_proj": problem.w2}
        inputs = problem.x_TD, problem.id_TK, problem.weight_TK
        return torch.func.functional_call(experts, weights, inputs)

    return step


def fairscale(problem: Problem) -> Step:
    """The top-2 gate of fairscale and the einsums of its MOELayer, without a process group."""
    from fairscale.nn.moe.top2gate import top2gating

    shape = problem.shape
    if shape.top_k != 2 or shape.capacity_factor != 1:
        raise UnavailableError("its gate is for top_k 2 with capacity factor 1")
    if problem.dtype != torch.float32:
        raise UnavailableError("its dispatch is in fp32")
    if shape.tokens % shape.num_experts:
        raise UnavailableError("its gate needs a number of tokens that is a multiple of that of experts")
    if 2 * shape.tokens**2 > LARGEST_DISPATCH:
        raise UnavailableError("its dispatch tensor (T, E, C) would be too large")

    def step() -> Tensor:
        _, combine_TEC, mask_TEC = top2gating(F.linear(problem.x_TD, problem.router_ED))
        return through_buffers(problem, mask_TEC.float(), combine_TEC)

    return step


def vllm(problem: Problem) -> Step:
    """The fused experts of vLLM for CPU, on weights packed beforehand; bf16, gated, forward only."""
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    shape = problem.shape
    if problem.dtype != torch.bfloat16 or not shape.gated or shape.capacity_factor is not None:
        raise UnavailableError("runs gated, dropless experts in bf16")
    if shape.activation not in VLLM_ACTIVATIONS or shape.model_dim % 32 or shape.hidden_dim % 32:
        raise UnavailableError(
            f"needs widths that are multiples of 32 and one of {', '.join(VLLM_ACTIVATIONS)}"
        )
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    with torch.no_grad():
        w13 = cpu_prepack_moe_weight(problem.w1.flatten(1, 2), isa)
        w2 = cpu_prepack_moe_weight(problem.w2, isa)
    ids = problem.id_TK.int()
    # Newer versions write to a tensor they are given, older ones return one.
    into: list[Any] = []
    if "output" in inspect.signature(cpu_fused_moe).parameters:
        into = [torch.empty_like(problem.x_TD, requires_grad=False)]

    def step() -> Tensor:
        rest = w13, w2, None, None, problem.weight_TK.detach(), ids, shape.activation, isa
        made = cpu_fused_moe(*into, problem.x_TD, *rest)
        return into[0] if into else made

    return step


PEERS = (
    Implementation(
        name="transformers grouped_mm",
        make=transformers_grouped_mm,
        modules=("transformers.integrations.moe",),
    ),
    Implementation(
        name="transformers eager",
        make=transformers_eager,
        modules=("transformers.models.mixtral.modeling_mixtral",),
    ),
    Implementation(
        name="fairscale", make=fairscale, modules=("fairscale.nn.moe.top2gate",), modes=(FORWARD, TRAINING)
    ),
    Implementation(name="vllm", make=vllm, modules=("vllm._custom_ops",), modes=(FORWARD, DECODE)),
)
