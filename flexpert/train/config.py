"""The configuration of a training run, read from YAML and `key=value` overrides."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.core.registry import check_options

T = TypeVar("T")
TASKS = ("vision", "language")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on.

    Attributes:
        name: the data set; "fashion_mnist" for images, "python_source" for text.
        folder: where its files lie; None to find or fetch them.
        shift: random shift of training images, in pixels each way.
        flip: mirror half of the training images.
        sequence_length: tokens of a text that are predicted together.
    """

    name: str = "fashion_mnist"
    folder: str | None = None
    shift: int = 2
    flip: bool = True
    sequence_length: int = 256


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up and a cosine to zero.

    Attributes:
        batch_size: images or sequences in a step, of all ranks together.
        epochs: passes over the training data; need not be whole.
        lr: peak learning rate.
        warmup: share of the steps in which it rises to the peak.
        weight_decay: on matrices; never on biases, norms and what the model names.
        clip: largest norm of the gradient.
        label_smoothing: of the cross entropy.
        dtype: "float32", or "bfloat16" for autocast.
        accumulate: micro-batches that a step's batch is cut into, to save memory; gradients add up.
        bias_rate: what a step moves the selection biases by, where routers have them; see `BiasBalancer`.
    """

    batch_size: int = 256
    epochs: float = 5.0
    lr: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip: float = 1.0
    label_smoothing: float = 0.1
    dtype: str = "float32"
    accumulate: int = 1
    bias_rate: float = 0.001


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How several ranks share the model; see `flexpert.parallel`. It changes no result.

    Attributes:
        replicas: copies of all experts; divides the ranks.
        slices: ranks that share one expert; None for as few as the ranks allow.
        dense: what is no expert: "ddp" copies it to every rank, "fsdp" shards it.
        plan: "auto": the tuner chooses, step by step (`flexpert.tune`); or fields of `ExecutionPlan`, whose
            others have their defaults: {} is the default plan.
        deterministic: the tuner measures nothing, so that a resumed run repeats an uninterrupted one exactly.
        verify: compare what the ranks are about to do before rows travel.
    """

    replicas: int = 1
    slices: int | None = None
    dense: str = "ddp"
    plan: Mapping[str, Any] | str = "auto"
    deterministic: bool = False
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run.

    Attributes:
        task: "vision" (images) or "language" (text).
        name: of the run's folder.
        output: the folder that holds the runs.
        seed: of weights, order, augmentation and noise.
        model: the preset and changes to it; see `flexpert.models`.
        checkpoint_every: steps between checkpoints.
        checkpoint_async: write checkpoints in the background, while training goes on.
        log_every: steps between lines of metrics.
        threads: CPU threads; None leaves PyTorch's choice.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        backend: of torch.distributed on several ranks; None for "nccl" on GPUs and "gloo" elsewhere.
        timeout: seconds that a rank waits for the others before it gives up.
        ranks: processes that train together; None for those of torchrun, else one.
        parallel: how they share the model.
    """

    task: str = "vision"
    name: str = "run"
    output: str = "runs"
    seed: int = 0
    model: Mapping[str, Any] = field(default_factory=lambda: {"preset": "tiny"})
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint_every: int = 100
    checkpoint_async: bool = True
    log_every: int = 20
    threads: int | None = None
    device: str | None = None
    backend: str | None = None
    timeout: float = 600.0
    ranks: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        o, p = self.optimizer, self.parallel
        _require("task", self.task, self.task in TASKS, f"one of {', '.join(TASKS)}")
        _require("name", self.name, bool(self.name) and "/" not in self.name, "a name without '/'")
        _require("seed", self.seed, 0 <= self.seed < 2**63, "an integer in 0..2**63 - 1")
        for name, value in (("checkpoint_every", self.checkpoint_every), ("log_every", self.log_every)):
            _require(name, value, value >= 1, "an integer >= 1")
        _require(
            "threads", self.threads, self.threads is None or self.threads >= 1, "None or an integer >= 1"
        )
        _require("ranks", self.ranks, self.ranks is None or self.ranks >= 1, "None or an integer >= 1")
        _require("parallel.replicas", p.replicas, p.replicas >= 1, "an integer >= 1")
        _require("parallel.slices", p.slices, p.slices is None or p.slices >= 1, "None or an integer >= 1")
        _require("parallel.dense", p.dense, p.dense in ("ddp", "fsdp"), "'ddp' or 'fsdp'")
        if isinstance(p.plan, str):
            _require("parallel.plan", p.plan, p.plan == "auto", "'auto' or fields of a plan, such as {r: 1}")
        else:
            ExecutionPlan.from_dict(p.plan)  # raises for a field or value that no plan has
        _require("timeout", self.timeout, 0 < self.timeout < math.inf, "a number > 0")
        _require(
            "data.sequence_length",
            self.data.sequence_length,
            self.data.sequence_length >= 1,
            "an integer >= 1",
        )
        _require("data.shift", self.data.shift, self.data.shift >= 0, "an integer >= 0")
        _require("optimizer.batch_size", o.batch_size, o.batch_size >= 1, "an integer >= 1")
        _require(
            "optimizer.accumulate",
            o.accumulate,
            1 <= o.accumulate <= o.batch_size,
            "an integer in 1..batch_size",
        )
        _require("optimizer.epochs", o.epochs, 0 < o.epochs < math.inf, "a number > 0")
        _require("optimizer.lr", o.lr, 0 < o.lr < math.inf, "a number > 0")
        _require("optimizer.warmup", o.warmup, 0 <= o.warmup < 1, "a share in 0..1")
        _require("optimizer.clip", o.clip, o.clip > 0, "a number > 0")
        _require("optimizer.bias_rate", o.bias_rate, 0 < o.bias_rate < math.inf, "a number > 0")
        _require("optimizer.dtype", o.dtype, o.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `decode(TrainConfig, ...)` is its inverse."""
        return dataclasses.asdict(self)


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply overrides such as `optimizer.lr=1e-3`.

    Raises:
        ConfigError: no such file, not YAML, an unknown key or a value of the wrong kind.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the config {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the config {str(path)!r}: it is no UTF-8 text ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(data).__name__}")
    for key, value in parse_overrides(overrides).items():
        set_dotted(data, key, value)
    return decode(TrainConfig, data)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1"]` to `{"a.b": 1}`; values are read as YAML."""
    result = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {item!r}: expected key=value, such as optimizer.epochs=3")
        try:
            result[key] = _number(yaml.safe_load(text))
        except yaml.YAMLError:
            raise ConfigError(f"override {item!r}: the value is not valid YAML") from None
    return result


def set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    """Set `data["a"]["b"]` for the key "a.b", making dicts on the way."""
    *parents, last = key.split(".")
    for name in parents:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {key!r}: {name!r} is a value, not a group of settings")
    data[last] = value


def decode(kind: type[T], data: Mapping[str, Any], prefix: str = "") -> T:
    """Build a dataclass of settings from plain data.

    Raises:
        ConfigError: an unknown key (the valid ones are listed) or a value of the wrong kind.
    """
    hints = typing.get_type_hints(kind)
    check_options(f"{kind.__name__}{f' ({prefix[:-1]})' if prefix else ''}", data, hints)
    return kind(**{key: _convert(hints[key], value, prefix + key) for key, value in data.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}={value!r}: expected a group of settings")
        return decode(typing.cast("type[Any]", hint), value, f"{name}.")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(option) or option for option in options)
    value = _number(value)
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        names = {type(None): "None", Mapping: "a group of settings"}
        expected = " or ".join(names.get(option, option.__name__) for option in plain)
        raise ConfigError(f"{name}={value!r}: expected {expected}")
    return value


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text: it wants a dot; nobody writes it so."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[0] in "+-.0123456789" else value
        except (ValueError, IndexError):
            return value
    return value


def _require(name: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        raise ConfigError(f"{name}={value!r}: expected {expected}")
