from __future__ import annotations

import copy
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, Swinv2ForImageClassification

from flexpert import CheckpointError, MoE, RoutingContext, routing_scope
from flexpert.models import SwinV2MoEForImageClassification, SwinV2MoEModel, parameter_groups, preset


def build(config, seed=0):
    torch.manual_seed(seed)
    return SwinV2MoEForImageClassification(config)


def moe_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


# ---- structure


@pytest.mark.parametrize("router", ["linear", "cosine"])
@pytest.mark.parametrize(("name", "dense", "moe"), [("small", 65.8e6, 541.8e6), ("base", 109.3e6, 955.3e6)])
def test_parameter_counts_of_the_paper(name, dense, moe, router):
    for num_experts, published in ((0, dense), (32, moe)):
        with torch.device("meta"):
            model = SwinV2MoEForImageClassification(preset(name, num_experts=num_experts, router=router))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert model.num_parameters() == pytest.approx(published, rel=0.005)
        if router == "linear":  # the paper's count of active parameters leaves the router out
            assert model.num_active_parameters() == pytest.approx(dense, rel=0.005)


def test_moe_layers_stand_in_the_named_blocks():
    with torch.device("meta"):
        model = SwinV2MoEForImageClassification(preset("small"))
    block = "swinv2.encoder.layers.{}.blocks.{}.intermediate".format
    assert list(moe_layers(model)) == [*(block(2, i) for i in range(1, 18, 2)), block(3, 1)]
    assert {layer.config.model_dim for layer in moe_layers(model).values()} == {384, 768}


def test_dense_twin_is_swinv2_without_the_second_bias(small_config):
    twin = build(small_config(num_experts=0))
    stock = Swinv2ForImageClassification(twin.config)
    biases = {name for name, _ in stock.named_parameters() if name.endswith(".output.dense.bias")}
    biases = {name for name in biases if ".attention." not in name}
    shapes = {name: p.shape for name, p in stock.named_parameters() if name not in biases}
    assert {name: p.shape for name, p in twin.named_parameters()} == shapes
    assert len(biases) == 5
    assert not moe_layers(twin)


def test_dense_twin_with_biases_computes_as_swinv2(small_config, batch):
    twin = build(small_config(num_experts=0, mlp_fc2_bias=True)).eval()
    stock = Swinv2ForImageClassification(twin.config).eval()
    stock.load_state_dict(twin.state_dict())
    assert torch.equal(twin(batch[0]).logits, stock(batch[0]).logits)


def test_one_expert_equals_the_dense_twin(small_config, batch):
    """With E = 1 every weight is 1 and no token is dropped: the network must be the dense one."""
    settings = {"mlp_fc2_bias": True, "capacity_factor": None}
    dense = build(small_config(num_experts=0, **settings)).double().eval()
    moe = build(small_config(num_experts=1, **settings)).double().eval()
    state = dense.state_dict()
    for name in moe_layers(moe):
        block = name.removesuffix(".intermediate")
        for ours, theirs in (("1", "intermediate"), ("2", "output")):
            state[f"{name}.experts.w{ours}"] = state.pop(f"{block}.{theirs}.dense.weight")[None]
            state[f"{name}.experts.b{ours}"] = state.pop(f"{block}.{theirs}.dense.bias")[None]
        state[f"{name}.router.weight"] = moe.state_dict()[f"{name}.router.weight"]
    moe.load_state_dict(state)
    images = batch[0].double()
    torch.testing.assert_close(moe(images).logits, dense(images).logits, rtol=1e-10, atol=1e-10)


def test_initial_weights():
    model = build(preset("tiny"))
    for layer in moe_layers(model).values():
        for weight in (layer.experts.w1, layer.experts.w2, layer.router.weight):
            # a normal distribution cut at two deviations has 0.88 of the deviation
            assert 0.8 * 0.005 < weight.std().item() < 1.15 * 0.005
        assert not layer.experts.b1.any()
    block = model.swinv2.encoder.layers[1].blocks[0]
    assert block.intermediate.dense.weight.std().item() == pytest.approx(0.02, rel=0.1)


# ---- forward and losses


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_shapes(small_config, channels, count):
    model = build(small_config(num_channels=channels)).eval()
    output = model(torch.randn(count, channels, 32, 32))
    assert output.logits.shape == (count, 5)
    assert output.loss is None
    assert output.aux_loss is None


def test_loss_is_cross_entropy_plus_weighted_balance(small_config, batch):
    for reduction in ("mean", "sum"):
        model = build(small_config(balance_weight=0.25, balance_reduction=reduction)).eval()
        images, labels = batch
        with routing_scope(model) as scope:
            output = model(images, labels=labels)
        terms = scope.losses["importance_load"]
        assert terms.shape == (2,)
        expected = 0.25 * getattr(terms, reduction)()
        assert expected > 0
        torch.testing.assert_close(output.aux_loss, expected)
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels) + expected)
        torch.testing.assert_close(model.weighted_balance_loss(scope.losses), expected)
        torch.testing.assert_close(model(images, labels=labels).loss, output.loss)  # without a scope around


def test_dense_twin_has_cross_entropy_alone(small_config, batch):
    images, labels = batch
    output = build(small_config(num_experts=0)).train()(images, labels=labels)
    assert output.aux_loss is None
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


def test_tuple_output(small_config, batch):
    images, labels = batch
    model = build(small_config()).eval()
    output = model(images, labels=labels)
    loss, logits, *_ = model(images, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_gradient_reaches_every_parameter(small_config, batch):
    images, labels = batch
    model = build(small_config(router="cosine", capacity_factor=None)).train()
    model(images, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for layer in moe_layers(model).values():
        assert all(parameter.grad.any() for parameter in layer.parameters())


def test_cross_entropy_alone_moves_the_router(small_config, batch):
    images, labels = batch
    model = build(small_config()).train()
    F.cross_entropy(model(images).logits, labels).backward()
    assert all(layer.router.weight.grad.any() for layer in moe_layers(model).values())


@pytest.mark.parametrize("with_scope", [False, True])
def test_activation_checkpointing_changes_nothing(small_config, batch, with_scope):
    images, labels = batch
    grads = []
    for checkpointing in (False, True):
        model = build(small_config()).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        with routing_scope(model) if with_scope else nullcontext() as scope:
            model(images, labels=labels).loss.backward()
        assert scope is None or len(scope.stats) == 2
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_compiled_model_computes_the_same(small_config, batch):
    images, labels = batch
    two_stages = {"depths": (1, 2), "num_heads": (1, 2), "pretrained_window_sizes": (0, 0)}
    model = build(small_config(**two_stages)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, labels=labels).loss, model(images, labels=labels).loss)


def test_a_copy_reports_its_own_losses(small_config, batch):
    images, labels = batch
    model = build(small_config()).eval()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(images, labels=labels).loss, model(images, labels=labels).loss)


def test_one_step_lowers_the_loss(small_config, batch):
    images, labels = batch
    model = build(small_config(gate_noise=0, balance_loss="balance")).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)
    before = model(images, labels=labels).loss
    before.backward()
    optimizer.step()
    assert model(images, labels=labels).loss < before


# ---- routing at evaluation


def test_capacity_and_top_k_of_a_call(small_config, batch):
    images, _ = batch
    model = build(small_config()).eval()
    usual = model(images).logits

    def run(**overrides):
        with routing_scope(model, context=RoutingContext(**overrides)) as scope:
            logits = model(images).logits
        return logits, list(scope.stats.values())

    _, stats = run(capacity_factor=None)
    assert all(s.dropped == 0 for s in stats)
    scarce, stats = run(capacity_factor=0.25)
    tokens = [6 * 16, 6 * 4]  # 4x4 and 2x2 tokens of each image
    for s, count in zip(stats, tokens, strict=True):
        assert (s.load_E <= int(0.25 * count / 4)).all()
        assert s.dropped == count - s.load_E.sum()
    assert not torch.equal(scarce, usual)
    _, stats = run(top_k=3, capacity_factor=None)
    assert [s.load_E.sum().item() for s in stats] == [3 * count for count in tokens]
    assert torch.equal(model(images).logits, usual)  # nothing stuck


# ---- files


def test_saved_and_loaded_model_computes_the_same(small_config, batch, tmp_path):
    model = build(small_config(router="cosine", top_k=2)).eval()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = SwinV2MoEForImageClassification.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(batch[0]).logits, model(batch[0]).logits)


def test_auto_classes(small_config, batch, tmp_path):
    model = build(small_config()).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is SwinV2MoEForImageClassification
    assert torch.equal(loaded(batch[0]).logits, model(batch[0]).logits)
    assert AutoConfig.from_pretrained(tmp_path).num_experts == 4
    backbone = AutoModel.from_config(model.config)
    assert type(backbone) is SwinV2MoEModel


def test_model_card(small_config, tmp_path):
    build(small_config()).save_pretrained(tmp_path / "moe")
    card = (tmp_path / "moe" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: flexpert\n")
    assert "2: stage 2 block 1, stage 3 block 1" in card
    assert "4, top-1" in card
    build(small_config(num_experts=0)).save_pretrained(tmp_path / "dense")
    assert "MoE" not in (tmp_path / "dense" / "README.md").read_text()


def test_existing_card_is_kept(small_config, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    build(small_config()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.fixture
def saved(small_config, tmp_path):
    build(small_config()).save_pretrained(tmp_path)
    return tmp_path


def load(folder, **options):
    return SwinV2MoEForImageClassification.from_pretrained(folder, **options)


def test_missing_weight_is_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    del tensors["swinv2.encoder.layers.1.blocks.1.intermediate.experts.w1"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing, such as .*experts\.w1"):
        load(saved)


def test_foreign_weight_is_refused(saved):
    tensors = load_file(saved / "model.safetensors") | {"foreign": torch.zeros(1)}
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 unexpected, such as foreign"):
        load(saved)


def test_other_shapes_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_experts": 8}))
    with pytest.raises(CheckpointError, match="does not hold the weights of its config"):
        load(saved)
    with pytest.raises(CheckpointError, match="mismatched"):
        load(saved, ignore_mismatched_sizes=True)


def test_truncated_file_is_refused(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="does not hold the weights of its config"):
        load(saved)


def test_another_classifier_for_fine_tuning(saved):
    model = load(saved, num_labels=7, ignore_mismatched_sizes=True)
    assert isinstance(model.classifier, nn.Linear)
    assert model.classifier.weight.shape == (7, 32)
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)


# ---- packaging


def test_flexpert_alone_does_not_import_transformers():
    code = "import sys, flexpert; raise SystemExit(any('transformers' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_transformers_the_message_names_the_remedy():
    code = "import sys; sys.modules['transformers'] = None; import flexpert.models"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode != 0
    assert "pip install 'flexpert[vision]'" in result.stderr


# ---- no image at all


def test_an_empty_batch_takes_part_without_effect(small_config, batch):
    model = build(small_config()).train()
    calls = []
    for layer in moe_layers(model).values():
        layer.router.register_forward_hook(lambda module, args, routing: calls.append(routing.num_units))
    with routing_scope(model, context=RoutingContext(step=0, samples=(6, 6))) as scope:
        output = model(batch[0][:0], output_hidden_states=True)
    assert output.logits.shape == (0, 5)
    assert all(state.shape[0] == 0 for state in output.hidden_states)
    assert calls == [0, 0]
    assert all(stats.tokens == 0 for stats in scope.stats.values())
    assert output.aux_loss == 0
    (output.logits.sum() + output.aux_loss).backward()
    # Gradients of zero, not none: the backward of every layer has run, as on ranks with images.
    assert all(p.grad is not None and not p.grad.count_nonzero() for p in model.parameters())
    with torch.no_grad():
        assert model(batch[0][:0], labels=batch[1][:0]).loss == 0
        whole = model.eval()(batch[0]).logits
        assert model(batch[0][:0]).logits.shape == (0, 5)
        assert torch.equal(model(batch[0]).logits, whole)  # nothing sticks


def test_an_empty_batch_that_fails_leaves_nothing_behind(small_config, batch):
    model = build(small_config()).eval()
    with torch.no_grad():
        whole = model(batch[0]).logits
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.zeros(0, 3, 32, 32))
        assert torch.equal(model(batch[0]).logits, whole)
