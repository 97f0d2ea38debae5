"""Adapters to packages that are not installed here, with stand-ins that have their signatures."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from flexpert import ops
from flexpert.bench.implementations import UnavailableError, fused
from flexpert.bench.peers import PEERS
from flexpert.testing import assert_close

BY_NAME = {item.name: item for item in PEERS}


@pytest.fixture
def install(monkeypatch):
    """A function that makes a module of functions importable, with the packages above it."""

    def installed(name, **functions):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:depth]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for key, function in functions.items():
            setattr(module, key, function)

    return installed


def wanted(problem):
    with ops.use_backend("reference"), torch.no_grad():
        return fused(problem)()


def experts(x, w13, w2, weights, ids):
    """What vLLM's kernel computes, by loops; weights come packed, here: negated."""
    out = torch.zeros(x.shape)
    for token, choices in enumerate(ids):
        for choice, expert in enumerate(choices):
            gate, up = (-w13[expert].float() @ x[token].float()).chunk(2)
            out[token] += weights[token, choice] * (-w2[expert].float() @ (F.silu(gate) * up))
    return out.to(x.dtype)


@pytest.mark.parametrize("version", ["returns", "writes"])
def test_vllm(make, install, version):
    def returns(input, w13, w2, w13_bias, w2_bias, topk_weights, topk_ids, act, isa):  # noqa: A002
        assert (w13_bias, w2_bias, act) == (None, None, "silu")
        assert isa in {"amx", "vec"}
        assert topk_ids.dtype == torch.int32
        return experts(input, w13, w2, topk_weights, topk_ids)

    def writes(output, input, w13, w2, w13_bias, w2_bias, topk_weights, topk_ids, act, isa, skip=False):  # noqa: A002
        output.copy_(returns(input, w13, w2, w13_bias, w2_bias, topk_weights, topk_ids, act, isa))

    function = {"returns": returns, "writes": writes}[version]
    install("vllm._custom_ops", cpu_fused_moe=function, cpu_prepack_moe_weight=lambda weight, isa: -weight)
    problem = make(gated=True, activation="silu", model_dim=32, hidden_dim=32, tokens=5, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_close(BY_NAME["vllm"].build(problem)(), wanted(problem), 2e-2)
    for changes in ({"gated": False}, {"capacity_factor": 1.0}, {"model_dim": 16}, {"activation": "relu"}):
        facts = {"gated": True, "activation": "silu", "model_dim": 32, "hidden_dim": 32} | changes
        with pytest.raises(UnavailableError, match="needs|runs"):
            BY_NAME["vllm"].build(make(dtype=torch.bfloat16, **facts))


def test_fairscale(make, install):
    problem = make(capacity_factor=1.0)
    places = torch.zeros(24, 4, 24)
    for token, choices in enumerate(problem.id_TK):
        for choice, expert in enumerate(choices):
            if expert < 4:
                places[token, expert, token] = problem.weight_TK[token, choice]

    def top2gating(logits):
        torch.testing.assert_close(logits, problem.x_TD @ problem.router_ED.T)
        return torch.zeros(()), places, places.bool()

    install("fairscale.nn.moe.top2gate", top2gating=top2gating)
    with torch.no_grad():
        assert_close(BY_NAME["fairscale"].build(problem)(), wanted(problem), 1e-5)
    for changes in ({"top_k": 1}, {"capacity_factor": None}, {"tokens": 23}, {"dtype": torch.bfloat16}):
        with pytest.raises(UnavailableError, match="its gate|fp32"):
            BY_NAME["fairscale"].build(make(**({"capacity_factor": 1.0} | changes)))


@pytest.mark.parametrize("name", ["fairscale", "transformers eager", "transformers grouped_mm", "vllm"])
def test_a_missing_package_is_told(make, monkeypatch, name):
    package = name.split(" ", maxsplit=1)[0]
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnavailableError, match=f"{package} cannot be imported: "):
        BY_NAME[name].build(make())
