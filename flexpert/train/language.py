"""The language-model job: next bytes of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError
from flexpert.core.stats import reduce_stats
from flexpert.models.generation import generate_text
from flexpert.models.moe_lm import MoELanguageForCausalLM
from flexpert.models.moe_lm_config import MoELanguageConfig, language_preset
from flexpert.models.weight_decay import parameter_groups
from flexpert.scope import routing_scope

from .config import TrainConfig
from .figures import drop_rate, quieten_transformers, shares
from .parallel import OneRank, weighted
from .task import StepResult
from .text import TextBatches, load_python_source, windows_at
from .world import World, cut

DATASETS = {"python_source": load_python_source}
VALID_WINDOWS = 512  # at most; spread evenly over the held-out text
SAMPLE = "def main():\n"


class LanguageTask:
    """Trains and evaluates a byte-level MoE language model; see `Task`.

    Args:
        config: settings of the run.
        model: in place of a new one made from the settings.
        ranks: that share each batch and the held-out text; this process alone if not given.
    """

    score = "bits_per_byte"

    def __init__(
        self,
        config: TrainConfig,
        model: MoELanguageForCausalLM | None = None,
        ranks: OneRank | None = None,
    ) -> None:
        self.config = config
        self.ranks = OneRank(device=World().device(config.device)) if ranks is None else ranks
        quieten_transformers()
        self.device = self.ranks.device
        if config.data.name not in DATASETS:
            raise ConfigError(f"data.name={config.data.name!r}: expected one of {', '.join(DATASETS)}")
        self.dataset = DATASETS[config.data.name](config.data.folder)
        self.model = build_model(config) if model is None else model
        self.model.to(self.device)
        self.length = config.data.sequence_length
        if self.length > self.model.config.max_position_embeddings:
            raise ConfigError(
                f"data.sequence_length={self.length}: the model has max_position_embeddings="
                f"{self.model.config.max_position_embeddings}; raise that or shorten the sequence"
            )
        batch_size = config.optimizer.batch_size
        self.batches = TextBatches(
            self.dataset.train, length=self.length, batch_size=batch_size, seed=config.seed
        )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.tokens_per_step = batch_size * self.length

    @classmethod
    def from_saved(cls, config: TrainConfig, folder: Path, ranks: OneRank | None = None) -> LanguageTask:
        """The task with the model that `save` wrote.

        Raises:
            CheckpointError: a damaged or foreign file.
        """
        quieten_transformers()
        return cls(config, MoELanguageForCausalLM.from_pretrained(folder), ranks)

    @property
    def source(self) -> str:
        """What is trained on, for people."""
        megabytes = len(self.dataset.train) / 1e6
        return f"{megabytes:.1f} MB of text from {self.dataset.source}"

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW."""
        return parameter_groups(self.model, weight_decay)

    def loss(self, step: int, part: int = 0, parts: int = 1) -> StepResult:
        """Cross entropy plus the weighted balance loss of this rank's windows; see `Task`."""
        total, world = self.batches.batch_size, self.ranks.world
        begin, stop = cut(0, total, part, parts)
        samples = cut(begin, stop, world.rank, world.size)
        windows = self.batches.train(step, samples).to(self.device)
        context = RoutingContext(step=step, samples=samples, all_reduce=self.ranks.all_reduce)
        with routing_scope(self.model, context=context) as scope:
            logits = self._logits(windows[:, :-1])
        own = len(windows) * world.size / total  # a mean over own windows becomes one over the batch
        smoothing = self.config.optimizer.label_smoothing
        targets = windows[:, 1:].flatten()
        loss = logits.sum()
        bits = loss.detach()
        if own:
            flat = logits.flatten(0, 1)
            loss = weighted(F.cross_entropy(flat, targets, label_smoothing=smoothing), own)
            bits = loss.detach() / math.log(2)
            if smoothing:
                bits = weighted(F.cross_entropy(flat.detach(), targets), own) / math.log(2)
        metrics = {self.score: bits}
        if scope.infos:
            share = (stop - begin) / total
            loss = loss + weighted(self.model.weighted_balance_loss(scope.losses), share)
            name = self.model.config.balance_loss
            metrics[name] = weighted(scope.losses[name].detach().mean(), share)
        return StepResult(loss, metrics, scope.stats)

    @torch.no_grad()
    def evaluate(self, context: RoutingContext | None = None, batch_size: int = 16) -> dict[str, float]:
        """Loss and bits per byte on held-out text, and where there are MoE layers the share of drops.

        Ranks take whole batches in turn; each calls the model equally often, in the end perhaps with nothing.
        """
        self.model.eval()
        starts, world = self._valid_starts(), self.ranks.world
        loss, dropped, selected = 0.0, 0.0, 0.0
        for turn in range(0, len(starts), batch_size * world.size):
            first = turn + batch_size * world.rank
            windows = self._valid(starts[first : first + batch_size])
            with routing_scope(self.model, context=context) as scope:
                logits = self._logits(windows[:, :-1])
            loss += float(
                F.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten(), reduction="sum")
            )
            dropped += sum(float(s.dropped) for s in scope.stats.values())
            selected += sum(float(s.selected_E.sum()) for s in scope.stats.values())
        sums = torch.tensor([loss, dropped, selected], dtype=torch.float64, device=self.device)
        loss, dropped, selected = self.ranks.total(sums).tolist()
        count = len(starts) * self.length
        loss /= count
        return {
            "validation_loss": loss,
            self.score: loss / math.log(2),
            "bytes": count,
            **drop_rate(dropped, selected),
        }

    def load(self, windows: int = 64) -> Mapping[str, list[float]]:
        """Share of the rows each expert computes on held-out text, by layer; empty for a dense model."""
        self.model.eval()
        world, starts = self.ranks.world, self._valid_starts()
        first, end = cut(0, min(windows, len(starts)), world.rank, world.size)
        with torch.no_grad(), routing_scope(self.model) as scope:
            self._logits(self._valid(starts[first:end])[:, :-1])
        stats = reduce_stats(scope.stats, self.ranks.total)
        return {name: shares(value) for (name, _), value in stats.items()}

    def save(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the model: safetensors, config, card; as one process would, also where ranks share it."""
        model, config = self.model, cast("MoELanguageConfig", self.model.config)
        if type(model) is not MoELanguageForCausalLM:  # data parallelism has put another class on it
            with torch.device("meta"):
                model = MoELanguageForCausalLM(config)
        model.save_pretrained(folder, state_dict=tensors)

    def closing(self, folder: Path) -> dict[str, Any]:
        """A text that the saved model writes, for people to read."""
        model = MoELanguageForCausalLM.from_pretrained(folder).eval()
        room = model.config.max_position_embeddings - len(SAMPLE) - 1
        return {"sample": SAMPLE + generate_text(model, SAMPLE, max_new_tokens=min(300, room))}

    @staticmethod
    def headline(figures: Mapping[str, Any]) -> str:
        """The figures of `evaluate` in a phrase."""
        return (
            f"{figures['bits_per_byte']:.4f} bits per byte on {figures['bytes']} held-out bytes "
            f"(validation loss {figures['validation_loss']:.4f})"
        )

    def _valid_starts(self) -> Tensor:
        count = (len(self.dataset.valid) - 1) // self.length
        if count < 1:
            raise ConfigError(
                f"data.sequence_length={self.length}: only {len(self.dataset.valid)} bytes are held out; "
                f"shorten the sequence or add text"
            )
        stride = max(1, math.ceil(count / VALID_WINDOWS))
        return torch.arange(0, count, stride) * self.length

    def _valid(self, starts: Tensor) -> Tensor:
        return windows_at(self.dataset.valid, starts, self.length).to(self.device)

    def _logits(self, ids: Tensor) -> Tensor:
        bfloat16 = self.config.optimizer.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return self.model(input_ids=ids, use_cache=False).logits.float()


def build_model(config: TrainConfig) -> MoELanguageForCausalLM:
    """A new model from the settings: a preset and changes to it.

    Raises:
        ConfigError: no preset, or settings the model does not have.
    """
    settings = dict(config.model)
    if "preset" not in settings:
        raise ConfigError("model.preset is missing; expected tiny")
    return MoELanguageForCausalLM(language_preset(settings.pop("preset"), **settings))
