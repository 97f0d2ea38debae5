"""The configuration of one MoE layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from .errors import ConfigError, FlexpertError
from .registry import Spec, check_options, split_spec

if TYPE_CHECKING:
    from torch import nn


class _Layer(Protocol):
    def num_active_params(self) -> int: ...
    def flops_per_token(self) -> int: ...
    def parameters(self) -> Any: ...


_BUILDERS: dict[str, Any] = {}


def set_builder(builder: Any) -> Any:
    """Decorator by which the layer, in a room above, tells `MoEConfig.build` how to make it."""
    _BUILDERS["moe"] = builder
    return builder


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One MoE layer, as plain data.

    Attributes:
        model_dim: D, width of a token.
        hidden_dim: F, width of an expert's hidden layer.
        num_experts: E.
        top_k: K, experts per token (a default; it can be given at each call).
        router: name of a router or {"name": ..., option: ...}; see `flexpert.routers`.
        expert: name of an expert kind, {"name": ..., option: ...}, or a list of these with a "count" each for
            a bank of unlike experts; see `flexpert.experts`.
        activation: name of the experts' activation; see `flexpert.ops.activations`.
        expert_bias: False, True, "b1" (hidden only) or "b2" (output only).
        output_dim: width of the result; None means model_dim.
        renormalize: weights of a token divided by their sum: False; True (not for K = 1, whose gate would get
            no gradient); "always".
        capacity_factor: rows an expert keeps of each token group = top_k * max(1, int(capacity_factor *
            ceil(T / E))) where > 0; 0.0: exactly what is needed, nothing dropped; < 0: what is needed, at
            most that of its absolute value; None: dropless, without a limit.
        batch_prioritized: tokens of higher gate score take their places first (Riquelme et al., arXiv
            2106.05974, section 4) instead of in order of arrival.
        combine: name of the combine rule or a dict with options; see `flexpert.combine`.
        num_shared_experts: experts that every token visits.
        shared_hidden_dim: width of each shared expert's hidden layer; None means hidden_dim.
        shared_gate: weigh the shared experts' output by sigmoid(x . g).
        losses: names (or dicts with options) of the loss terms to compute; see `flexpert.losses`.
    """

    model_dim: int
    hidden_dim: int
    num_experts: int
    top_k: int = 1
    router: Spec = "linear"
    expert: Spec | Sequence[Spec] = "mlp"
    activation: str = "gelu"
    expert_bias: bool | str = False
    output_dim: int | None = None
    renormalize: bool | str = False
    capacity_factor: float | None = None
    batch_prioritized: bool = False
    combine: Spec = "sum"
    num_shared_experts: int = 0
    shared_hidden_dim: int | None = None
    shared_gate: bool = False
    losses: Sequence[Spec] = ("balance",)

    def __post_init__(self) -> None:
        for name in ("model_dim", "hidden_dim", "num_experts"):
            require_int(name, getattr(self, name), least=1)
        require_int("num_shared_experts", self.num_shared_experts, least=0)
        if self.output_dim is not None:
            require_int("output_dim", self.output_dim, least=1)
        for name in ("batch_prioritized", "shared_gate"):
            require_bool(name, getattr(self, name))
        check_top_k(self.top_k, self.num_experts)
        check_renormalize(self.renormalize)
        check_bias("expert_bias", self.expert_bias)
        check_capacity_factor(self.capacity_factor)
        if self.shared_gate and not self.num_shared_experts:
            raise ConfigError(
                "shared_gate=True needs num_shared_experts >= 1; there is no shared expert to gate"
            )
        if self.shared_hidden_dim is not None:
            require_int("shared_hidden_dim", self.shared_hidden_dim, least=1)
            if not self.num_shared_experts:
                raise ConfigError(
                    f"shared_hidden_dim={self.shared_hidden_dim} needs num_shared_experts >= 1; there is no "
                    f"shared expert"
                )
        split_spec(self.router, "router")
        split_spec(self.combine, "combine")
        _check_specs("losses", self.losses)
        if isinstance(self.expert, (str, Mapping)):
            split_spec(self.expert, "expert")
        else:
            _check_specs("expert", self.expert)
        for name in ("router", "expert", "combine", "losses"):
            object.__setattr__(self, name, _plain(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of numbers, strings, lists and dicts; `from_dict` is its inverse."""
        return {f.name: _plain(getattr(self, f.name), as_list=True) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MoEConfig:
        """The configuration of a plain dict; the dict is left as it was.

        Raises:
            ConfigError: an unknown key (the valid ones are listed), a missing one or a bad value.
        """
        fields = dataclasses.fields(cls)
        check_options("MoEConfig", data, [f.name for f in fields])
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in data]
        if missing:
            raise ConfigError(f"MoEConfig: missing {', '.join(missing)}")
        return cls(**data)

    def build(self) -> nn.Module:
        """The layer; parameters are on the current default device (`with torch.device("meta")` works)."""
        return cast("nn.Module", _BUILDERS["moe"](self))

    def num_params(self) -> int:
        """Parameters of the layer."""
        return sum(p.numel() for p in self._on_meta().parameters())

    def num_active_params(self) -> int:
        """Parameters that a token meets: router, shared experts and the K largest experts."""
        return self._on_meta().num_active_params()

    def flops_per_token(self) -> int:
        """Floating-point operations of a forward pass's matrix products per token (2 per multiply-add)."""
        return self._on_meta().flops_per_token()

    def _on_meta(self) -> _Layer:
        # The global generator is put back: asking for a size must not change the weights of what follows.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return cast("_Layer", self.build())


def check_capacity_factor(value: Any, error: type[FlexpertError] = ConfigError) -> None:
    """Raise the error unless the value is None or a finite number."""
    if value is not None and not _is_number(value):
        raise error(
            f"capacity_factor={value!r}: expected None (dropless), a number > 0 (fixed), 0 (adaptive) or "
            f"< 0 (adaptive, at most its absolute value)"
        )


def check_top_k(value: Any, num_experts: int, error: type[FlexpertError] = ConfigError) -> None:
    """Raise the error unless the value is an integer in 1..num_experts."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= num_experts:
        raise error(f"top_k={value!r}: expected an integer, 1 <= top_k <= num_experts={num_experts}")


def check_renormalize(value: bool | str) -> None:
    """Raise `ConfigError` unless the value is one of those `MoEConfig.renormalize` allows."""
    if value not in (False, True, "always"):
        raise ConfigError(f"renormalize={value!r}: expected False, True (not for top_k = 1) or 'always'")


def check_bias(name: str, value: Any) -> None:
    """Raise `ConfigError` unless the value is one of those `MoEConfig.expert_bias` allows."""
    if value not in (False, True, "b1", "b2"):
        raise ConfigError(f"{name}={value!r}: expected False, True, 'b1' or 'b2'")


def require_int(name: str, value: Any, least: int) -> None:
    """Raise `ConfigError` unless the value is an integer, not a bool, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: expected an integer >= {least}")


def require_bool(name: str, value: Any) -> None:
    """Raise `ConfigError` unless the value is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: expected True or False")


def require_number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> None:
    """Raise `ConfigError` unless the value is a finite number, >= `least` and > `above` where given."""
    if (
        not _is_number(value)
        or (least is not None and value < least)
        or (above is not None and value <= above)
    ):
        bound = f" >= {least}" if least is not None else f" > {above}" if above is not None else ""
        raise ConfigError(f"{name}={value!r}: expected a finite number{bound}")


def _is_number(value: Any) -> bool:
    # Compared, not asked by math.isfinite: in a compiled graph of any shape numbers may be symbols.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _check_specs(name: str, value: Any) -> None:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise ConfigError(f"{name}={value!r}: expected a list of names or of dicts with the key 'name'")
    for spec in value:
        split_spec(spec, name)


def _plain(value: Any, *, as_list: bool = False) -> Any:
    """A copy made of plain containers, so that no caller's dict is shared or changed."""
    if isinstance(value, Mapping):
        return {key: _plain(item, as_list=as_list) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, as_list=as_list) for item in value]
        return items if as_list else tuple(items)
    return value
