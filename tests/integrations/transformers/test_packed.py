"""Packed weights in place of a model's own: the same results, names and bits, and one copy."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexpert import ConfigError, InputError
from flexpert.integrations.transformers import RouterProbe, enable, prepack, unpack
from flexpert.integrations.transformers.packed import PackedExperts
from flexpert.ops import packing
from flexpert.testing import assert_close
from tests.integrations.transformers.models import build, tokens

BF16 = torch.bfloat16
needs_packing = pytest.mark.skipif(
    packing.why_not(torch.device("cpu"), BF16) is not None,
    reason=str(packing.why_not(torch.device("cpu"), BF16)),
)


def packed_model(name):
    model = build(name, BF16)
    enable(model)
    want, state = model(tokens()).logits.detach(), {k: v.clone() for k, v in model.state_dict().items()}
    result = prepack(model)
    assert result
    assert set(result.values()) == {None}
    return model, want, state


@needs_packing
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"])
def test_results_and_state_are_those_of_the_model(name):
    model, want, state = packed_model(name)
    enable(model)  # nothing is left to do
    with torch.no_grad(), RouterProbe(model) as probe:
        assert_close(model(tokens()).logits, want, 1e-2)
    assert probe.stats
    after = model.state_dict()
    assert set(after) == set(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    unpack(model)
    assert not any(isinstance(module, PackedExperts) for module in model.modules())
    assert torch.equal(model(tokens()).logits, want)
    model.train()
    model(tokens(), labels=tokens()).loss.backward()


@needs_packing
def test_there_is_no_second_copy():
    model = build("mixtral", BF16)
    enable(model)
    own = [weakref.ref(p) for name, p in model.named_parameters() if "experts" in name]
    size = sum(p().nbytes for p in own)
    prepack(model)
    gc.collect()
    assert all(p() is None for p in own)
    buffers = [b for module in model.modules() if isinstance(module, PackedExperts) for b in module.buffers()]
    assert sum(b.nbytes for b in buffers) == size, "these sizes are multiples of 32"


@needs_packing
def test_decoding_saving_and_loading(tmp_path):
    model, _, state = packed_model("olmoe")
    ids = tokens(2, 4)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert model.generate(ids, **options).shape == (2, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in state.items())
    changed = {key: value + 1 if "experts" in key else value for key, value in state.items()}
    model.load_state_dict(changed)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in changed.items())


@needs_packing
def test_compiles_as_one_graph_and_can_be_copied():
    model, _, _ = packed_model("olmoe")
    experts = copy.deepcopy(model).model.layers[0].mlp.experts
    x, ids = torch.randn(3, 32).to(BF16), torch.tensor([[0, 1], [7, 2], [3, 4]])
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, want = (
            f(x, ids, torch.full((3, 2), 0.5)) for f in (compiled, model.model.layers[0].mlp.experts)
        )
    assert torch.equal(got, want)


@needs_packing
def test_what_packed_weights_cannot_do_is_refused():
    model, _, state = packed_model("mixtral")
    with pytest.raises(ConfigError, match="cannot be trained.*unpack"):
        model.train()
    with pytest.raises(ConfigError, match="cannot become torch.float32.*unpack"):
        model.float()
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(InputError, match="packed in torch.bfloat16, and they got torch.float32"):
        experts(torch.zeros(1, 32), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    key = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(RuntimeError, match=r"down_proj: \(5, 32, 8\) where \(5, 32, 32\) is packed"):
        model.load_state_dict({**state, key: torch.zeros(5, 32, 8)})
    with pytest.raises(RuntimeError, match="Missing key.*down_proj"):
        model.load_state_dict({name: value for name, value in state.items() if name != key})


def test_what_cannot_be_packed_says_why():
    model = build("mixtral")
    with pytest.raises(ConfigError, match="training mode"):
        prepack(model.train())
    assert all("float32" in reason for reason in prepack(model.eval()).values())
    reasons = prepack(build("gpt_oss", BF16))
    assert all("GptOssExperts has no packed form" in reason for reason in reasons.values())
    tied = build("mixtral", BF16)
    first, second = (layer.mlp.experts for layer in tied.model.layers)
    second.down_proj = first.down_proj
    assert all("down_proj is shared with another module" in reason for reason in prepack(tied).values())
