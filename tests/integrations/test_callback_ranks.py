"""The callbacks on two ranks: the training of one process on the batches of both together."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from flexpert.integrations.transformers.callback import MoECallback
from flexpert.models import MoELanguageForCausalLM, language_preset
from flexpert.testing import run_ranks

GLOBAL = {"name": "balance", "scope": "global"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def mixtral():
    """The loss has its scope from the callback; no router has a bias."""
    torch.manual_seed(0)
    more = {"intermediate_size": 8, "num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 50}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **more)), GLOBAL


def language():
    """The loss has its scope from the layers; every router has a bias."""
    torch.manual_seed(0)
    more = {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "expert_hidden_dim": 8}
    return MoELanguageForCausalLM(language_preset("tiny", **SIZES, **more)), "balance"


MODELS = {"mixtral": mixtral, "language": language}


def samples():
    """Sequences of 12 tokens with labels for some, so that ranks have unlike shares of a batch."""
    ids = torch.randint(1, 50, (16, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for i in range(16):
        labels[i, 4 + i % 8 :] = -100
    return [{"input_ids": i, "labels": k} for i, k in zip(ids, labels, strict=True)]


def state(model, callback, figures):
    loads = {layer: stats.selected_E.tolist() for layer, stats in callback.stats.items()}
    return {n: t.tolist() for n, t in model.state_dict().items()}, figures, loads


def with_trainer(name, batch, checkpointing):
    model, loss = MODELS[name]()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=batch, gradient_accumulation_steps=2, max_steps=3,
            optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True,
            save_strategy="no", logging_steps=1, disable_tqdm=True, train_sampling_strategy="sequential",
            report_to=[], dataloader_pin_memory=False, activation_checkpointing=checkpointing,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=samples())
        callback = MoECallback(balance_weight=0.3, loss=loss, bias_rate=0.05).attach(trainer)
        trainer.train()
    names = ("loss", "routing/balance_loss", "routing/entropy", "routing/max_violation")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return state(model, callback, [[entry[name] for name in names] for entry in logged])


def with_lightning(name, batch, devices):
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from flexpert.integrations.lightning import MoECallback as LightningCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.balance = MODELS[name]()
            self.seen = []

        def training_step(self, ids, index):
            logits = self.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits, ids[:, 1:].flatten())

        def on_train_batch_end(self, *_):
            self.seen.append([float(v) for k, v in self.trainer.logged_metrics.items() if k.count("/") == 1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module()
    callback = LightningCallback(balance_weight=0.3, loss=module.balance, bias_rate=0.05)
    rank = torch.distributed.get_rank() if devices > 1 else 0
    ids = torch.stack([sample["input_ids"] for sample in samples()]).view(4, 4, 12)
    strategy = DDPStrategy(cluster_environment=LightningEnvironment(), process_group_backend="gloo")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers and samplers
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=devices, strategy=strategy if devices > 1 else "auto",
            logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[callback], default_root_dir=folder, use_distributed_sampler=False,
            accumulate_grad_batches=2,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(ids[:, batch * rank : batch * (rank + 1)], batch_size=None)
        trainer.fit(module, loader)
    return state(module.model, callback, module.seen[1::2])


def on_a_rank():
    """Every case; what a launcher would have set is set here."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    return {
        **{f"trainer, {name}": with_trainer(name, 2, name == "language") for name in MODELS},
        **{f"lightning, {name}": with_lightning(name, 2, 2) for name in MODELS},
    }


@pytest.fixture(scope="module")
def ranks():
    pytest.importorskip("lightning.pytorch")
    return run_ranks(on_a_rank, 2, timeout=300)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("library", ["trainer", "lightning"])
def test_ranks_train_as_one_process(library, name, ranks):
    want = with_trainer(name, 4, name == "language") if library == "trainer" else with_lightning(name, 4, 1)
    for rank in ranks:
        tensors, figures, loads = rank[f"{library}, {name}"]
        assert loads == want[2]
        torch.testing.assert_close(torch.tensor(figures), torch.tensor(want[1]), rtol=1e-4, atol=1e-6)
        for key, values in want[0].items():
            torch.testing.assert_close(torch.tensor(tensors[key]), torch.tensor(values), rtol=1e-4, atol=1e-6)
