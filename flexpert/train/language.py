"""The language-model job: next bytes of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.core.errors import ConfigError
from flexpert.models.generation import generate_text
from flexpert.models.moe_lm import MoELanguageForCausalLM
from flexpert.models.moe_lm_config import language_preset

from .config import TrainConfig
from .model_task import ModelTask
from .one_rank import OneRank
from .text import TextBatches, load_python_source, windows_at

HELD_OUT_WINDOWS = 512  # at most; spread evenly over the held-out text
SAMPLE = "def main():\n"


class LanguageTask(ModelTask):
    """Trains and evaluates a byte-level MoE language model; see `ModelTask`. An item is a window of text."""

    model_class = MoELanguageForCausalLM
    datasets = {"python_source": load_python_source}  # noqa: RUF012 - declared in the base
    score = "bits_per_byte"
    evaluation_batch = 16
    load_items = 64

    def __init__(self, config: TrainConfig, model: Any = None, ranks: OneRank | None = None) -> None:
        super().__init__(config, model, ranks)
        self.length, longest = config.data.sequence_length, self.model.config.max_position_embeddings
        if self.length > longest:
            raise ConfigError(
                f"data.sequence_length={self.length}: the model has max_position_embeddings={longest}; "
                f"raise that or shorten the sequence"
            )
        batch_size = config.optimizer.batch_size
        self.batches = TextBatches(
            self.dataset.train, length=self.length, batch_size=batch_size, seed=config.seed
        )
        self.tokens_per_step = batch_size * self.length
        self._starts = self._held_out_starts()

    @property
    def source(self) -> str:
        """What is trained on, for people."""
        return f"{len(self.dataset.train) / 1e6:.1f} MB of text from {self.dataset.source}"

    def new_model(self, preset: str, changes: dict[str, Any]) -> MoELanguageForCausalLM:
        """A new model of a preset with changes to it.

        Raises:
            ConfigError: an unknown preset, or settings the model does not have.
        """
        return MoELanguageForCausalLM(language_preset(preset, **changes))

    def batch_loss(self, step: int, samples: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy, and as bits per byte, of these windows; of none: zeros with a graph."""
        windows = self.batches.train(step, samples).to(self.device)
        logits = self._logits(windows[:, :-1])
        if not len(windows):
            return logits.sum(), {self.score: logits.detach().sum()}
        flat, targets = logits.flatten(0, 1), windows[:, 1:].flatten()
        plain = loss = F.cross_entropy(flat, targets)
        if smoothing := self.config.optimizer.label_smoothing:
            loss = F.cross_entropy(flat, targets, label_smoothing=smoothing)
        return loss, {self.score: plain.detach() / math.log(2)}

    def held_out(self) -> int:
        """Number of held-out windows."""
        return len(self._starts)

    def held_out_sums(self, first: int, end: int) -> list[float]:
        """Of these held-out windows: the cross entropy, summed over bytes."""
        windows = windows_at(self.dataset.valid, self._starts[first:end], self.length).to(self.device)
        logits = self._logits(windows[:, :-1]).flatten(0, 1).double()
        return [float(F.cross_entropy(logits, windows[:, 1:].flatten(), reduction="sum"))]

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Loss and bits per byte on held-out text, and its number of bytes."""
        count = self.held_out() * self.length
        loss = sums[0] / count
        return {"validation_loss": loss, self.score: loss / math.log(2), "bytes": count}

    def closing(self, folder: Path) -> dict[str, Any]:
        """A text that the saved model writes, for people to read."""
        model = MoELanguageForCausalLM.from_pretrained(folder).eval()
        room = model.config.max_position_embeddings - len(SAMPLE) - 1
        return {"sample": SAMPLE + generate_text(model, SAMPLE, max_new_tokens=min(300, room))}

    def headline(self, figures: Mapping[str, Any]) -> str:
        """The figures of `evaluate` in a phrase."""
        return (
            f"{figures['bits_per_byte']:.4f} bits per byte on {figures['bytes']} held-out bytes "
            f"(validation loss {figures['validation_loss']:.4f})"
        )

    def _held_out_starts(self) -> Tensor:
        count = (len(self.dataset.valid) - 1) // self.length
        if count < 1:
            raise ConfigError(
                f"data.sequence_length={self.length}: only {len(self.dataset.valid)} bytes are held out; "
                f"shorten the sequence or add text"
            )
        return torch.arange(0, count, max(1, math.ceil(count / HELD_OUT_WINDOWS))) * self.length

    def _logits(self, ids: Tensor) -> Tensor:
        with self.autocast():
            return self.model(input_ids=ids, use_cache=False).logits.float()
