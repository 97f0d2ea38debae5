"""A callback for the Trainer of `transformers`; the package around it does not import this module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("MoECallback needs the package transformers: pip install 'flexpert[hf]'") from error

from flexpert.core.errors import ConfigError
from flexpert.integrations.upkeep import RoutingUpkeep, UpkeepCallback

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class MoECallback(UpkeepCallback, TrainerCallback):
    """Keeps the routers of a model in order while a `transformers.Trainer` trains it.

    `MoECallback().attach(trainer)`, then `trainer.train()`. In training, and there only, the weighted balance
    loss is added to the loss that the model returns; after each step of the optimiser the routers' selection
    biases move by the load of its micro-batches; with each loss, the statistics since the last one are
    logged by the Trainer (history, console, TensorBoard and others): see `RoutingUpkeep.figures`. The model
    is one of transformers, or has Flexpert's layers.

    Each micro-batch's balance loss has the weight of its cross entropy: where the Trainer divides by the
    number of labels in the whole batch, its share of them, else 1 / micro-batches.

    Args:
        settings: the fields of `UpkeepSettings`: balance_weight, loss, bias_rate.

    Attributes:
        stats: by layer, what was logged last.
    """

    _is_first = _has_loss_function = False
    _micro_batches = 1
    _pending: Tensor | None = None
    _hooks: tuple[RemovableHandle, ...] = ()
    _call: ExitStack  # around the model's call, in training

    def attach(self, trainer: Trainer) -> MoECallback:
        """Add the callback to a trainer, before those that report what is logged."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        self._is_first = True
        return self

    def loss_function(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """For `Trainer(compute_loss_func=...)`: a loss of one's own, and the balance loss added to it.

        Args:
            function: as of the Trainer: (outputs, labels, num_items_in_batch) -> scalar, already divided by
                the number of micro-batches.
        """
        self._has_loss_function = True

        @functools.wraps(function)
        def with_balance(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
            loss = function(outputs, labels, num_items_in_batch=num_items_in_batch)
            term, self._pending = self._pending, None
            if term is None:
                return loss
            share = 1 / self._micro_batches
            if num_items_in_batch is not None:
                share = self._share({"labels": labels}, num_items_in_batch)
            return loss + term * share

        return with_balance

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything, then watch the model.

        Raises:
            ConfigError: a model without routed experts, or settings under which a part would not be done.
        """
        if args.report_to and not self._is_first:
            raise ConfigError(
                f"args.report_to={args.report_to} reports before a callback given to the Trainer has its "
                f"figures; leave it out of callbacks=[...] and call MoECallback(...).attach(trainer)"
            )
        if args.n_gpu > 1:
            raise ConfigError(f"{args.n_gpu} devices in one process: start one process for each by torchrun")
        self._detach()
        model: nn.Module = kwargs["model"]
        self._upkeep = RoutingUpkeep(model, self.settings)
        if self._upkeep.weight and args.label_smoothing_factor and not self._has_loss_function:
            raise ConfigError(
                f"args.label_smoothing_factor={args.label_smoothing_factor}: the Trainer then computes the "
                f"loss outside of the model; give it compute_loss_func=callback.loss_function(your_loss)"
            )
        self._micro_batches = args.gradient_accumulation_steps
        self._shifts = _shifts_labels(model)
        before = model.register_forward_pre_hook(self._begin)
        after = model.register_forward_hook(self._end, with_kwargs=True, always_call=True)
        self._hooks, self._call = (before, after), ExitStack()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """Between micro-batches."""
        if self._upkeep is not None:
            self._upkeep.close()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Move the biases."""
        if self._upkeep is not None:
            self._upkeep.close()
            self._upkeep.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to what is logged with a training loss."""
        if self._upkeep is None or logs is None or "loss" not in logs:
            return
        figures, self.stats = self._upkeep.figures()
        if figures:
            values = torch.stack([value.float() for value in figures.values()]).tolist()
            named = dict(zip(figures, values, strict=True))
            logs.update(named)
            state.log_history[-1].update(named)  # its entry was made before this was called

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._detach()

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._upkeep is not None:
            self._upkeep.close()
        self._hooks, self._upkeep, self._pending = (), None, None

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        if model.training and self._upkeep is not None:
            self._call.enter_context(self._upkeep.watching())

    def _end(self, model: nn.Module, inputs: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """The output with the loss of training; None, which changes nothing, where the call failed."""
        self._call.close()
        if not model.training or self._upkeep is None or output is None:
            return None
        self._upkeep.observe()
        if not self._upkeep.weight:
            return None
        term = self._upkeep.term()
        has_loss = output.get("loss") is not None if isinstance(output, Mapping) else "labels" in kwargs
        if not has_loss:
            self._pending = self._keep(model, term)
            return None
        items = kwargs.get("num_items_in_batch")
        if items is not None:
            term = term * self._share(kwargs, items)
        if isinstance(output, tuple):
            return (output[0] + term, *output[1:])
        output["loss"] = output["loss"] + term
        return output

    def _keep(self, model: nn.Module, term: Tensor) -> Tensor:
        if not self._has_loss_function:
            raise ConfigError(
                f"{type(model).__name__} returned no loss to which the balance loss could be added; give the "
                f"Trainer compute_loss_func=callback.loss_function(your_loss), or the callback "
                f"balance_weight=0"
            )
        return term

    def _share(self, inputs: Mapping[str, Any], items: Any) -> Any:
        """This micro-batch's share of the labels of a step, counted as the Trainer counts them."""
        labels = inputs.get("shift_labels")
        if labels is None:
            labels = inputs["labels"][..., 1:] if self._shifts else inputs["labels"]
        return labels.ne(-100).sum() / items


def _shifts_labels(model: nn.Module) -> bool:
    """Whether a model's loss predicts the next label, so that the first of a row is none."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    config = getattr(model, "config", None)
    causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return causal and not getattr(config, "is_encoder_decoder", False)
