"""The callback under the Trainer: against a loop that does the same by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from flexpert import BiasBalancer, ConfigError, routing_scope
from flexpert.integrations.transformers import RouterProbe, bias_balancer
from flexpert.integrations.transformers.callback import MoECallback
from flexpert.testing import assert_close

RATE = 0.5


def arguments(folder, **options):
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1, **options}
    return TrainingArguments(
        str(folder), optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0,
        save_strategy="no", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
        dataloader_pin_memory=False, **options,
    )  # fmt: skip


def fit(model, samples, folder, callback, compute_loss_func=None, **options):
    trainer = Trainer(
        model=model, args=arguments(folder, **options), train_dataset=samples,
        compute_loss_func=compute_loss_func,
    )  # fmt: skip
    callback.attach(trainer)
    trainer.train()
    return trainer


def batches_of(samples, size=2):
    for i in range(0, len(samples), size):
        part = samples[i : i + size]
        yield {name: torch.stack([sample[name] for sample in part]) for name in part[0]}


def by_hand(model, samples, accumulation, weight, bias_rate):
    """The same steps; losses of the steps, and the rows of each layer in the last one."""
    model.train()
    ours = hasattr(model, "weighted_balance_loss")
    watch = routing_scope if ours else RouterProbe
    balancer = None
    if bias_rate:
        make = BiasBalancer if ours else bias_balancer
        balancer = make(model, rate=bias_rate)
    batches = list(batches_of(samples))
    losses = []
    for first in range(0, len(batches), accumulation):
        step = batches[first : first + accumulation]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        total, rows = 0.0, {}
        for batch in step:
            labels = batch["labels"][:, 1:].flatten()
            with watch(model) as seen:
                logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / items
            if weight:
                terms = seen.losses["balance"] if ours else seen.loss()
                loss = loss + weight * terms.mean() * (labels != -100).sum() / items
            loss.backward()
            total += float(loss.detach())
            if balancer:
                balancer.observe(seen.stats)
            for (layer, _), stats in seen.stats.items():
                rows[layer] = rows.get(layer, 0) + stats.selected_E
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)
                    parameter.grad = None
        if balancer:
            balancer.step()
        losses.append(total)
    return losses, rows


@pytest.mark.parametrize(
    ("kind", "accumulation", "checkpointing", "weight", "rate"),
    [
        ("mixtral", 1, False, 0.3, 0.001),
        ("mixtral", 3, True, 0.3, 0.001),
        ("deepseek", 3, True, 0.2, 0.05),
        ("deepseek", 1, False, None, 0.05),
        ("language", 3, False, 0.2, 0.05),
    ],
)
def test_trains_as_a_loop_by_hand(
    kind, accumulation, checkpointing, weight, rate, request, samples, tmp_path
):
    model = request.getfixturevalue(kind)()
    reference = copy.deepcopy(model)
    callback = MoECallback(balance_weight=weight, bias_rate=rate)
    options = {"gradient_accumulation_steps": accumulation, "activation_checkpointing": checkpointing}
    trainer = fit(model, samples, tmp_path, callback, **options)
    hand = by_hand(reference, samples, accumulation, weight or 0.0, rate if kind != "mixtral" else 0)
    assert trainer.state.global_step == math.ceil(4 / accumulation) == len(hand[0])
    for got, want in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        assert_close(got, want, 1e-4)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx(hand[0], rel=1e-4)
    assert {layer: stats.selected_E.tolist() for layer, stats in callback.stats.items()} == {
        layer: rows.tolist() for layer, rows in hand[1].items()
    }
    for entry in logged:
        assert ("routing/balance_loss" in entry) == bool(weight)
    for layer, rows in hand[1].items():
        want = float(rows.max() / rows.mean() - 1)
        assert logged[-1][f"routing/{layer}/max_violation"] == pytest.approx(want, rel=1e-5)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_loss_of_ones_own_gets_the_balance_loss(mixtral, samples, tmp_path):
    model = mixtral()
    reference = copy.deepcopy(model)
    callback = MoECallback(balance_weight=0.3)

    def cross_entropy(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    fit(
        model, samples, tmp_path, callback, callback.loss_function(cross_entropy),
        gradient_accumulation_steps=3,
    )  # fmt: skip
    by_hand(reference, samples, 3, 0.3, 0)
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(got, want, 1e-4)


def test_evaluation_is_without_the_balance_loss(mixtral, samples, tmp_path):
    model = mixtral()
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=samples, eval_dataset=samples[:2])
    MoECallback(balance_weight=100.0).attach(trainer)
    trainer.add_callback(_EvaluateOnce(trainer))
    trainer.train()
    (evaluated,) = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert evaluated["eval_loss"] == pytest.approx(math.log(50), abs=1.5)
    assert "routing/entropy" not in evaluated


def _EvaluateOnce(trainer):
    from transformers import TrainerCallback

    class Once(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.evaluate()

    return Once()


def test_tensorboard_has_the_figures(mixtral, samples, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = tmp_path / "board"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(board))
        trainer = fit(mixtral(), samples, tmp_path / "run", MoECallback(), report_to=["tensorboard"])
    reader = events.EventAccumulator(str(board)).Reload()
    layer = "model.layers.1.mlp"
    for name in ("routing/balance_loss", "routing/entropy", f"routing/{layer}/max_violation"):
        values = [event.value for event in reader.Scalars(f"train/{name}")]
        assert values == pytest.approx([e[name] for e in trainer.state.log_history if "loss" in e], rel=1e-5)


def test_the_default_leaves_balanced_models_alone(mixtral, deepseek, language, samples, tmp_path):
    weights = {}
    for name, model in {
        "mixtral": mixtral(),
        "deepseek": deepseek(),
        "language": language(),
        "own": language(router="linear", balance_weight=0.01),
    }.items():
        callback = MoECallback()
        trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=samples)
        callback.attach(trainer)
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
        weights[name] = callback._upkeep.weight
    assert weights == {"mixtral": 0.01, "deepseek": 0.0, "language": 0.0, "own": 0.0}


def test_errors_come_before_the_first_step(mixtral, language, samples, tmp_path):
    dense = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=50
        )
    )
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no routed experts"):
        fit(dense, samples, tmp_path, MoECallback())
    with pytest.raises(ConfigError, match="output_router_logits=True.*set it to False"):
        fit(mixtral(output_router_logits=True, router_aux_loss_coef=0.1), samples, tmp_path, MoECallback())
    with pytest.raises(ConfigError, match="balance_weight=0.5: MoELanguageForCausalLM adds its own"):
        fit(language(balance_weight=0.1), samples, tmp_path, MoECallback(balance_weight=0.5))
    with pytest.raises(ConfigError, match="label_smoothing_factor=0.1.*loss_function"):
        fit(mixtral(), samples, tmp_path, MoECallback(), label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="balance_weight=-1"):
        fit(mixtral(), samples, tmp_path, MoECallback(balance_weight=-1))
    with pytest.raises(ConfigError, match="unknown loss 'balanse'"):
        fit(mixtral(), samples, tmp_path, MoECallback(loss="balanse"))
    args = arguments(tmp_path, report_to=["tensorboard"])
    trainer = Trainer(model=mixtral(), args=args, train_dataset=samples, callbacks=[MoECallback()])
    with pytest.raises(ConfigError, match=r"report_to=\['tensorboard'\].*attach\(trainer\)"):
        trainer.train()
    model = mixtral()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="returned no loss.*loss_function"):
        fit(model, samples, tmp_path, MoECallback(), lambda *_, **__: torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
