"""Whole models on our operators: training, checkpointing, compilation, decoding, saving."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flexpert import ConfigError
from flexpert.integrations.transformers import RouterProbe, enable
from flexpert.integrations.transformers.blocks import experts_of
from flexpert.testing import assert_close, relative_error
from tests.integrations.transformers.models import NAMES, build, checkpoint, tokens


def step(model, implementation, dtype=None):
    """The loss and every gradient by name."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = tokens()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.fixture(autouse=True, scope="module")
def _enabled():
    enable()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_training_step_is_that_of_eager(name, checkpointed):
    model = build(name).train()
    want = step(model, "eager")
    if checkpointed:
        checkpoint(model)
    got = step(model, "flexpert")
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert_close(got[key], value, 2e-5, name=key, scale=1e-4)


def test_autocast_computes_in_its_dtype():
    model = build("mixtral").train()
    truth = step(model, "eager")
    eager, got = (step(model, name, torch.bfloat16) for name in ("eager", "flexpert"))
    for key, value in truth.items():
        assert got[key].dtype is value.dtype
        assert relative_error(got[key], value) < 1.5 * relative_error(eager[key], value) + 5e-3, key


@pytest.mark.parametrize("name", NAMES)
def test_generate_with_a_cache_gives_eagers_tokens(name):
    model, ids = build(name), tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want = model.generate(ids, **options)
    enable(model)
    assert model.config._experts_implementation == "flexpert"
    assert torch.equal(model.generate(ids, **options), want)


@pytest.mark.parametrize("name", NAMES)
def test_saved_models_have_the_same_keys_and_load_with_the_argument(name, tmp_path):
    model, ids = build(name), tokens()
    keys = set(model.state_dict())
    want = model(ids).logits
    enable(model)
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="flexpert")
    assert loaded.config._experts_implementation == "flexpert"
    assert set(loaded.state_dict()) == keys
    assert_close(loaded(ids).logits, want, 1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_compile_as_one_graph(name):
    model = build(name)
    enable(model)
    experts = next(iter(experts_of(model).values()))
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.stack([torch.arange(7) % 4, (torch.arange(7) + 1) % 4], 1)
    results = []
    for function in (experts, compiled):
        experts.zero_grad()
        weights = torch.full((7, 2), 0.5, requires_grad=True)
        y = function(x, ids, weights)
        y.square().sum().backward()
        results.append([y, weights.grad, *(p.grad.clone() for p in experts.parameters())])
    for one, other in zip(*results, strict=True):
        assert_close(other, one, 1e-6)


def test_a_compiled_model_gives_eagers_loss_and_probes_see_it():
    model, ids = build("olmoe"), tokens()
    want = model(ids, labels=ids).loss
    enable(model)
    with RouterProbe(model) as probe:
        model(ids)
        before = probe.stats
    compiled = torch.compile(model, backend="aot_eager")
    with RouterProbe(model) as probe:
        assert_close(compiled(ids, labels=ids).loss, want, 1e-5)
        got = probe.stats
    assert all(torch.equal(got[key].selected_E, before[key].selected_E) for key in before)


def test_weights_are_not_copied():
    model = build("mixtral")
    enable(model)
    experts = next(iter(experts_of(model).values()))
    own = {p.data_ptr() for p in experts.parameters()}
    seen = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.flexpert.grouped_mlp.default:
                seen.update(arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor) and arg.dim() > 2)
            return func(*args, **(kwargs or {}))

    with Watch():
        model(tokens())
    assert own <= seen


def test_errors_come_before_any_change():
    dense = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
        )
    )
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no routed experts.*mixture-of-experts model"):
        enable(dense)
    model = build("mixtral")
    experts = model.model.layers[1].mlp.experts
    down = experts.down_proj
    experts.down_proj = torch.nn.Parameter(down.detach()[:, :, :7])
    with pytest.raises(ConfigError, match=r"layers.1.mlp.experts.*\(5, 32, 7\).*unknown layout.*eager"):
        enable(model)
    del experts.down_proj
    with pytest.raises(ConfigError, match="has no down_proj.*unknown layout"):
        enable(model)
    assert model.config._experts_implementation != "flexpert"


def test_a_missing_transformers_is_one_clear_error():
    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "import flexpert.integrations.transformers as integration\n"
        "try:\n"
        "    integration.enable()\n"
        "except flexpert.ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import flexpert\n" + code], capture_output=True, text=True, check=True
    )
    assert "pip install 'flexpert[hf]'" in done.stdout
