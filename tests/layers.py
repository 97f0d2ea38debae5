"""Small layers of every kind, their contexts and inputs, for the tests of the layer."""

from __future__ import annotations

import torch

from flexpert import MoE, MoEConfig, RoutingContext

D, F, E = 6, 8, 5
ROUTERS = {
    "linear": "linear",
    "cosine": {"name": "cosine", "proj_dim": 4},
    "top_p": {"name": "linear", "selection": "top_p"},
    "threshold": {"name": "linear", "selection": {"name": "threshold", "threshold": 0.25}},
    "random": {"name": "linear", "selection": "random"},
    "balanced": {"name": "linear", "selection": "balanced"},
    "noisy": {"name": "linear", "gate_noise": 1.0, "input_jitter": 0.1},
    "learned_noise": {"name": "linear", "learned_noise": True},
    "sigmoid": {"name": "linear", "scoring": "sigmoid", "selection_bias": True},
    "hash": "hash",
    "expert_choice": "expert_choice",
    "soft": "soft",
}


def make_layer(router="linear", dtype=torch.float32, **options):
    torch.manual_seed(0)
    defaults = {"model_dim": D, "hidden_dim": F, "num_experts": E, "top_k": 2, "expert_bias": True}
    return MoE(MoEConfig(**{**defaults, "router": ROUTERS[router], **options})).to(dtype)


def context_for(x, **facts):
    ids = torch.arange(x[..., 0].numel()).view(x.shape[:-1])
    return RoutingContext(token_ids=ids, step=3, **facts)


def data(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
