"""What all recipes add to a model of `transformers`: the balance loss, strict loading, a model card."""

from __future__ import annotations

import os
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from flexpert.core.errors import CheckpointError
from flexpert.layer import MoE

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:
    PreTrainedModel = object  # a mixin: the model brings it


# With a metaclass, as DDP and FSDP cannot exchange the class of an heir of ABC.
class MoEPreTrained(PreTrainedModel, metaclass=ABCMeta):
    """Mixin before a `PreTrainedModel`; models give `card` and `weighted_balance_loss`.

    Attributes:
        fresh_head: the first part of the names of weights that `ignore_mismatched_sizes=True` may draw anew.
    """

    fresh_head: str | None = None

    @abstractmethod
    def card(self) -> str:
        """The text of the model card, in the form the Hugging Face hub reads."""

    @abstractmethod
    def weighted_balance_loss(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The balance loss as it enters the loss; losses by name, each 1-D over the MoE layers."""

    def with_balance_loss(self, output: Any, terms: Mapping[str, Tensor], return_dict: bool | None) -> Any:
        """A model's output with `aux_loss` set and in `loss`, as the model's `forward` returns it.

        Args:
            output: with `loss`, None without labels, and `aux_loss`.
            terms: the layers' losses; empty where nobody asked for them.
            return_dict: False for a tuple, None for what the config says.
        """
        if terms:
            output.aux_loss = self.weighted_balance_loss(terms)
            if output.loss is not None:
                output.loss = output.loss + output.aux_loss
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def num_active_parameters(self) -> int:
        """Parameters that a token meets: all but those of the experts it is not given to."""
        layers = [module for module in self.modules() if isinstance(module, MoE)]
        idle = sum(sum(p.numel() for p in layer.parameters()) - layer.num_active_params() for layer in layers)
        return int(self.num_parameters()) - idle

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write safetensors, config.json and, where there is none yet, a model card README.md.

        Args:
            save_directory: made if need be.
            args, kwargs: see `transformers.PreTrainedModel.save_pretrained`.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        card = Path(save_directory) / "README.md"
        if kwargs.get("is_main_process", True) and not card.exists():
            card.write_text(self.card(), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model; see `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: the file is damaged, or lacks weights, or has weights of other shapes or for
                other layers. With `ignore_mismatched_sizes=True` a head that the class allows may differ, for
                fine-tuning; it is then drawn anew.
        """
        path = pretrained_model_name_or_path
        with_info = kwargs.pop("output_loading_info", False)
        lenient = kwargs.get("ignore_mismatched_sizes", False) and cls.fresh_head is not None
        try:
            loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not hold the weights of its config: {error}") from error
        model, info = loaded
        for kind in ("missing", "unexpected", "mismatched"):
            names = [key if isinstance(key, str) else key[0] for key in info[f"{kind}_keys"]]
            names = sorted(name for name in names if not (lenient and name.startswith(str(cls.fresh_head))))
            if names:
                raise CheckpointError(
                    f"{path} does not hold the weights of its config: {len(names)} {kind}, such as "
                    f"{names[0]}; take config.json and weights from the same model"
                )
        return (model, info) if with_info else model
