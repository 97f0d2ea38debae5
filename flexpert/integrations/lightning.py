"""A callback for Lightning. Importing this module needs the package `lightning`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "flexpert.integrations.lightning needs the package lightning: pip install lightning"
    ) from error

from flexpert.core.errors import ConfigError

from .upkeep import RoutingUpkeep, UpkeepCallback


class MoECallback(UpkeepCallback, Callback):
    """Keeps the routers of a `LightningModule` in order while a Lightning `Trainer` trains it.

    `Trainer(callbacks=[MoECallback()])`. The weighted balance loss is added to what `training_step` returns,
    before Lightning divides it by the number of micro-batches; after each step of the optimiser the routers'
    selection biases move by the load of its micro-batches, and the step's statistics are logged with
    `log_dict`, so that every logger has them: see `RoutingUpkeep.figures`. The module has Flexpert's layers
    or models of transformers, at any depth.

    Args:
        settings: the fields of `UpkeepSettings`: balance_weight, loss, bias_rate.

    Attributes:
        stats: by layer, of the last step.
    """

    _steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything, then stand around `training_step`.

        Raises:
            ConfigError: a module without routed experts, or one that does its own backward where there is a
                loss to add.
        """
        upkeep = RoutingUpkeep(pl_module, self.settings)
        if upkeep.weight and not pl_module.automatic_optimization:
            raise ConfigError(
                f"{type(pl_module).__name__} has automatic_optimization=False, so no loss can be added to "
                f"its own; give balance_weight=0 and add routing_scope(...).losses or RouterProbe(...).loss()"
            )
        self._upkeep, self._steps = upkeep, trainer.global_step
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            with upkeep.watching():
                output = original(*args, **kwargs)
            upkeep.observe()
            return _added(output, upkeep) if upkeep.weight and output is not None else output

        vars(pl_module)["training_step"] = training_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the biases and log, where the optimiser made a step."""
        assert self._upkeep is not None
        self._upkeep.close()
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        self._upkeep.step()
        figures, self.stats = self._upkeep.figures()
        pl_module.log_dict(figures, on_step=True, on_epoch=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was; also after an error."""
        if self._upkeep is not None:
            self._upkeep.close()
            self._upkeep = None
            vars(pl_module).pop("training_step", None)


def _added(output: Any, upkeep: RoutingUpkeep) -> Any:
    """What `training_step` returned, a loss or a dict with one, and the balance loss in it."""
    if isinstance(output, Tensor):
        return output + upkeep.term()
    if isinstance(output, Mapping) and "loss" in output:
        return {**output, "loss": output["loss"] + upkeep.term()}
    raise ConfigError(
        f"training_step returned {type(output).__name__}; a balance loss can be added to a tensor, or to a "
        f"dict with 'loss'"
    )
