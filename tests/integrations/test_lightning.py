"""The callback under Lightning: against a loop that does the same by hand."""

from __future__ import annotations

import copy
import csv
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("lightning.pytorch")

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from flexpert import BiasBalancer, ConfigError, MoE, MoEConfig, routing_scope
from flexpert.integrations.lightning import MoECallback
from flexpert.integrations.transformers import RouterProbe, bias_balancer
from flexpert.testing import assert_close

RATE = 0.3


class Module(pl.LightningModule):
    """A model beside others, called in `training_step` and not by `forward`."""

    def __init__(self, model, as_dict=False):
        super().__init__()
        self.model, self.as_dict = model, as_dict

    def training_step(self, batch, batch_idx):
        loss = own_loss(self.model, batch)
        return {"loss": loss, "more": 1} if self.as_dict else loss

    def validation_step(self, batch, batch_idx):
        own_loss(self.model, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def own_loss(model, batch):
    if isinstance(batch, torch.Tensor):
        return model(batch).square().mean()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def layers():
    torch.manual_seed(0)
    router = {"name": "linear", "scoring": "sigmoid", "selection_bias": True}
    config = MoEConfig(model_dim=8, hidden_dim=8, num_experts=4, top_k=2, router=router)
    return torch.nn.Sequential(MoE(config), torch.nn.Tanh(), MoE(config))


def fit(module, batches, folder, callback, *, validate=None, logger=False, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, callbacks=[callback], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, default_root_dir=folder,
        num_sanity_val_steps=0, **options,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # advice on workers of loaders
        trainer.fit(module, loader(batches), None if validate is None else loader(validate))
    return trainer


def hooks(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def by_hand(model, batches, accumulation, weight, bias_rate, watch, make):
    model.train()
    balancer, last = (make(model, rate=bias_rate) if bias_rate else None), {}
    for first in range(0, len(batches), accumulation):
        step, last = batches[first : first + accumulation], {}
        for batch in step:
            with watch(model) as seen:
                loss = own_loss(model, batch)
            terms = seen.losses["balance"] if watch is routing_scope else seen.loss()
            ((loss + weight * terms.mean()) / accumulation).backward()
            if balancer:
                balancer.observe(seen.stats)
            for (layer, _), stats in seen.stats.items():
                last[layer] = last.get(layer, 0) + stats.selected_E
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)
                    parameter.grad = None
        if balancer:
            balancer.step()
    return last


def tokens(samples):
    batches = []
    for i in range(0, 8, 2):
        ids = torch.stack([sample["input_ids"] for sample in samples[i : i + 2]])
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


@pytest.mark.parametrize(
    ("kind", "accumulation"), [("layers", 1), ("layers", 3), ("mixtral", 2), ("deepseek", 2)]
)
def test_trains_as_a_loop_by_hand(kind, accumulation, request, samples, tmp_path):
    if kind == "layers":
        model, watch, make = layers(), routing_scope, BiasBalancer
        batches = list(torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2)))
    else:
        model, watch, make = request.getfixturevalue(kind)(), RouterProbe, bias_balancer
        batches = tokens(samples)
        if kind == "deepseek":
            model.activation_checkpointing_enable()
    rate = 0 if kind == "mixtral" else 0.05
    reference = copy.deepcopy(model)
    callback, module = MoECallback(balance_weight=0.3, bias_rate=0.05), Module(model, kind == "mixtral")
    trainer = fit(module, batches, tmp_path, callback, accumulate_grad_batches=accumulation)
    rows = by_hand(reference, batches, accumulation, 0.3, rate, watch, make)
    for got, want in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        assert_close(got, want, 1e-4)
    assert {layer: stats.selected_E.tolist() for layer, stats in callback.stats.items()} == {
        f"model.{layer}": rows_E.tolist() for layer, rows_E in rows.items()
    }
    worst = max(float(rows_E.max() / rows_E.mean() - 1) for rows_E in rows.values())
    assert float(trainer.logged_metrics["routing/max_violation"]) == pytest.approx(worst, rel=1e-5)
    assert "training_step" not in vars(module)
    assert hooks(model) == hooks(reference)


def test_loggers_have_the_figures_and_validation_has_no_part(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    batches = list(torch.randn(4, 5, 8))
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")]
    callback = MoECallback(balance_weight=0.1)
    fit(
        Module(layers()), batches, tmp_path, callback, validate=batches, logger=loggers,
        val_check_interval=2, accumulate_grad_batches=2,
    )  # fmt: skip
    assert all(int(stats.tokens) == 10 for stats in callback.stats.values())
    with Path(loggers[0].log_dir, "metrics.csv").open(encoding="utf-8") as file:
        written = [float(row["routing/entropy"]) for row in csv.DictReader(file)]
    reader = events.EventAccumulator(loggers[1].log_dir).Reload()
    assert len(written) == 2
    assert [event.value for event in reader.Scalars("routing/entropy")] == pytest.approx(written)
    assert reader.Scalars("routing/model.0/max_violation")


def test_errors_come_before_the_first_step(tmp_path):
    batches = list(torch.randn(2, 5, 8))
    with pytest.raises(ConfigError, match="Module has no routed experts"):
        fit(Module(torch.nn.Linear(8, 8)), batches, tmp_path, MoECallback())
    module = Module(layers())
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="automatic_optimization=False.*balance_weight=0"):
        fit(module, batches, tmp_path, MoECallback(balance_weight=0.1))
    module = Module(layers())
    module.training_step = lambda batch, batch_idx: [module.model(batch).sum()]
    with pytest.raises(ConfigError, match="training_step returned list"):
        fit(module, batches, tmp_path, MoECallback(balance_weight=0.1))
