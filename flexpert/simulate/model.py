"""A model as numbers: blocks with dense parameters, operations and activations, and their experts.

Letters as in docs: D, F widths, E experts, K choices of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexpert.core.config import (
    check_bias,
    check_capacity_factor,
    check_top_k,
    require_bool,
    require_int,
    require_number,
)
from flexpert.core.errors import ConfigError

from .describe import check_fields

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ExpertPart:
    """The experts of one MoE layer.

    Attributes:
        model_dim, hidden_dim, num_experts, top_k: D, F, E and K.
        capacity_factor, gated: as of `flexpert.MoEConfig`, and whether the experts are GLUs.
        bias: False, True, "b1" or "b2".
    """

    model_dim: int
    hidden_dim: int
    num_experts: int
    top_k: int = 1
    capacity_factor: float | None = None
    gated: bool = False
    bias: bool | str = False

    def __post_init__(self) -> None:
        for name in ("model_dim", "hidden_dim", "num_experts"):
            require_int(f"experts: {name}", getattr(self, name), least=1)
        try:
            check_top_k(self.top_k, self.num_experts)
            check_capacity_factor(self.capacity_factor)
            check_bias("bias", self.bias)
            require_bool("gated", self.gated)
        except ConfigError as error:
            raise ConfigError(f"experts: {error}") from None

    @property
    def matrices(self) -> int:
        """Matrices of an expert: 3 of a gated one."""
        return 3 if self.gated else 2

    @property
    def params(self) -> int:
        """Parameters of all experts."""
        hidden = (self.matrices - 1) * self.hidden_dim
        biases = hidden * (self.bias in (True, "b1")) + self.model_dim * (self.bias in (True, "b2"))
        return self.num_experts * (self.matrices * self.model_dim * self.hidden_dim + biases)

    def capacity(self, tokens: int) -> int | None:
        """Rows that an expert keeps of so many tokens; None where there is no limit of that kind."""
        if self.capacity_factor is None or self.capacity_factor == 0:
            return None
        each = int(abs(self.capacity_factor) * -(-tokens // self.num_experts))
        return self.top_k * max(1, each)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part of the network that is computed and kept, or computed anew, as a whole.

    Attributes:
        name: of it.
        tokens: of one sample here.
        width: of a token at its beginning.
        params: dense parameters.
        flops: of matrix products for one token, forward, without experts.
        activations: elements per token that its dense part keeps for backward.
        experts: of its MoE layer, if it has one.
    """

    name: str
    tokens: int
    width: int
    params: int = 0
    flops: float = 0.0
    activations: float = 0.0
    experts: ExpertPart | None = None

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("width", 1), ("params", 0)):
            require_int(f"block {self.name!r}: {name}", getattr(self, name), least=least)
        for name in ("flops", "activations"):
            require_number(f"block {self.name!r}: {name}", getattr(self, name), least=0)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network of blocks.

    Attributes:
        name: of it.
        blocks: in order.
        sample: what a batch is counted in: "token", "image" or "sequence".
        dtype: that it computes in.
        parameter_dtype: that parameters, gradients and AdamW's moments are stored in.
    """

    name: str
    blocks: tuple[Block, ...] = field(repr=False)
    sample: str = "token"
    dtype: str = "float32"
    parameter_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("dtype", "parameter_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ConfigError(
                    f"model: {name}={getattr(self, name)!r}, expected one of {', '.join(DTYPES)}"
                )
        if not self.blocks:
            raise ConfigError("model: blocks is empty, expected a block at least")

    @property
    def expert_parts(self) -> list[ExpertPart]:
        """The experts of the blocks that have some."""
        return [block.experts for block in self.blocks if block.experts is not None]

    @property
    def num_experts(self) -> int:
        """E of the largest layer; 0 for a dense model."""
        return max((b.experts.num_experts for b in self.blocks if b.experts), default=0)

    @property
    def dense_params(self) -> int:
        """Parameters that are no experts'."""
        return sum(block.params for block in self.blocks)

    @property
    def expert_params(self) -> int:
        """Parameters of all experts."""
        return sum(block.experts.params for block in self.blocks if block.experts)

    @property
    def params(self) -> int:
        """All parameters."""
        return self.dense_params + self.expert_params

    @property
    def active_params(self) -> int:
        """Parameters that a token meets: dense ones and K experts of each layer."""
        active = (
            b.experts.params * b.experts.top_k // b.experts.num_experts for b in self.blocks if b.experts
        )
        return self.dense_params + sum(active)

    @property
    def flops_per_sample(self) -> float:
        """Operations of a forward pass's products for one sample, every token keeping its K experts."""
        total = 0.0
        for block in self.blocks:
            total += block.tokens * block.flops
            if block.experts:
                part = block.experts
                total += block.tokens * part.top_k * 2 * part.matrices * part.model_dim * part.hidden_dim
        return total

    def with_experts(self, **changes: Any) -> Model:
        """The same model with other values of every layer's `ExpertPart`."""
        blocks = tuple(
            dataclasses.replace(block, experts=dataclasses.replace(block.experts, **changes))
            if block.experts
            else block
            for block in self.blocks
        )
        return dataclasses.replace(self, blocks=blocks)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Model:
        """A model of plain data: the fields of `Model`, with `blocks` a list of those of `Block`.

        Raises:
            ConfigError: an unknown, missing or bad field; the message names it.
        """
        check_fields("model", cls, data)
        if not isinstance(data["blocks"], (list, tuple)):
            raise ConfigError(f"model: blocks={data['blocks']!r:.60}, expected a list of mappings")
        blocks = []
        for place, entry in enumerate(data["blocks"]):
            where = f"model: blocks[{place}]"
            if not isinstance(entry, Mapping):
                raise ConfigError(f"{where}={entry!r:.60}, expected a mapping")
            values = {"name": str(place), **entry}
            check_fields(where, Block, values)
            experts = values.pop("experts", None)
            if experts is not None and not isinstance(experts, Mapping):
                raise ConfigError(f"{where}: experts={experts!r:.60}, expected a mapping")
            if experts is not None:
                check_fields(f"{where}: experts", ExpertPart, experts)
                values["experts"] = ExpertPart(**experts)
            blocks.append(Block(**values))
        return cls(**{**data, "blocks": tuple(blocks)})
