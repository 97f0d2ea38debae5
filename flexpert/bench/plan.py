"""What a run measures: the command's flags, checked, as a list of cells."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexpert import ops
from flexpert.core.errors import ConfigError

from .implementations import DECODE, FORWARD, OURS, PLAIN, REFERENCES, TRAINING, Implementation
from .machine import has_fast_bf16
from .peers import PEERS
from .problem import DTYPES, SHAPES, Shape

IMPLEMENTATIONS = {item.name: item for item in (*OURS, *REFERENCES, *PLAIN, *PEERS)}
QUICK = ("flexpert", "flexpert prepacked", "flexpert rows", "flexpert layer", "flexpert portable", "dense",
         "stream", "sort + loop", "F.grouped_mm")  # fmt: skip
CONFIGS = (*SHAPES, "D")
DECODE_TOKENS = (1, 8, 64)
MOST_THREADS = 1024
# Share of a table's seconds that each mode has.
SHARES = {FORWARD: 0.3, TRAINING: 0.7, DECODE: 0.3}
CUSTOM_FLAGS = ("tokens", "model_dim", "hidden_dim", "experts", "top_k", "expert", "capacity_factor",
                "activation", "dtype")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One shape in one dtype, and the modes it is measured in."""

    config: str
    shape: Shape
    dtype: str
    modes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run: `seconds` are those of one table, `minimum` the repetitions each row has at least."""

    cells: Sequence[Cell]
    implementations: Sequence[Implementation]
    seconds: float
    minimum: int
    threads: int | None
    memory: bool


def make_plan(
    *,
    quick: bool = False,
    configs: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    custom: Mapping[str, Any] | None = None,
    implementations: Sequence[str] | None = None,
    seconds: float | None = None,
    threads: int | None = None,
    memory: bool = True,
) -> Plan:
    """Check the flags and fill in what is not given.

    Args:
        quick: fewer dtypes, implementations, seconds and repetitions, where these are not given.
        configs: of A, B, C (training) and D (decode); all by default.
        dtypes: of fp32 and bf16; both by default.
        custom: values of a configuration of one's own, by flag (`CUSTOM_FLAGS`); empty or None for none.
        implementations: names; the references are measured in any case.
        seconds: timing budget of one table.
        threads: of PyTorch; as they are by default.
        memory: measure the peak memory of a training step.

    Raises:
        ConfigError: a value that cannot be; the message names the flag, the value and the remedy.
    """
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"--seconds {seconds}: expected a number > 0")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ConfigError(f"--threads {threads}: expected an integer from 1 to {MOST_THREADS}")
    for flag, values, known in (
        ("configs", configs, CONFIGS),
        ("dtypes", dtypes, DTYPES),
        ("implementations", implementations, IMPLEMENTATIONS),
    ):
        _check_choices(flag, values, known)
    given = {flag: value for flag, value in (custom or {}).items() if value is not None}
    if given and configs is not None:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise ConfigError(
            f"--configs {' '.join(configs)}: {flag} makes a configuration of its own; leave out one"
        )
    default = ["bf16" if has_fast_bf16() else "fp32"] if quick else list(DTYPES)
    if given:
        cells = _custom_cells(given, default if dtypes is None else dtypes, dtypes is not None)
    else:
        cells = _cells(
            configs, default if dtypes is None else dtypes, decode=dtypes is None or "bf16" in dtypes
        )
    names = implementations or (QUICK if quick else list(IMPLEMENTATIONS))
    references = [item.name for item in REFERENCES]
    chosen = [item for name, item in IMPLEMENTATIONS.items() if name in {*references, *names}]
    return Plan(
        cells=cells,
        implementations=chosen,
        seconds=seconds if seconds is not None else 4.0 if quick else 20.0,
        minimum=2 if quick else 3,
        threads=threads,
        memory=memory,
    )


def _check_choices(flag: str, values: Sequence[str] | None, known: Any) -> None:
    for value in values or ():
        if value not in known:
            raise ConfigError(f"--{flag} {value!r} is unknown; choose of: {', '.join(known)}")


def _cells(configs: Sequence[str] | None, dtypes: Sequence[str], *, decode: bool) -> list[Cell]:
    names = list(dict.fromkeys(configs or (CONFIGS if decode else SHAPES)))
    if "D" in names and not decode:
        raise ConfigError(
            f"--dtypes {' '.join(dtypes)}: configuration D is measured in bf16; add it, or leave out D"
        )
    cells = [
        Cell(config=name, shape=SHAPES[name], dtype=dtype, modes=(FORWARD, TRAINING))
        for name in names
        if name != "D"
        for dtype in dict.fromkeys(dtypes)
    ]
    if "D" in names:
        shapes = [dataclasses.replace(SHAPES["B"], tokens=tokens) for tokens in DECODE_TOKENS]
        cells += [Cell(config="D", shape=shape, dtype="bf16", modes=(DECODE,)) for shape in shapes]
    return cells


def _custom_cells(given: Mapping[str, Any], dtypes: Sequence[str], dtypes_given: bool) -> list[Cell]:
    """The configuration of the flags in each dtype, also as decode where its tokens are few."""
    if "dtype" in given:
        if dtypes_given:
            raise ConfigError(f"--dtype {given['dtype']}: --dtypes says it as well; leave out one")
        _check_choices("dtype", [given["dtype"]], DTYPES)
        dtypes = [given["dtype"]]
    shape = custom_shape(given)
    modes = (FORWARD, TRAINING, DECODE) if shape.tokens <= max(DECODE_TOKENS) else (FORWARD, TRAINING)
    cells = [Cell(config="custom", shape=shape, dtype=dtype, modes=modes) for dtype in dict.fromkeys(dtypes)]
    for cell in cells:
        _check_memory(cell)
    return cells


def custom_shape(given: Mapping[str, Any]) -> Shape:
    """The shape of the flags; those not given are as in configuration A, dropless."""
    for flag in ("tokens", "model_dim", "hidden_dim", "experts", "top_k"):
        if given.get(flag, 1) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {given[flag]}: expected an integer >= 1")
    _check_choices("expert", [given.get("expert", "mlp")], ("mlp", "glu"))
    gated = given.get("expert") == "glu"
    model_dim, num_experts = given.get("model_dim", 1024), given.get("experts", 8)
    top_k = given.get("top_k", min(2, num_experts))
    if top_k > num_experts:
        raise ConfigError(
            f"--top-k {top_k}: expected at most the number of experts, {num_experts}; see --experts"
        )
    factor = given.get("capacity_factor")
    if factor is not None and not (math.isfinite(factor) and factor > 0):
        raise ConfigError(f"--capacity-factor {factor}: expected a number > 0; leave it out for dropless")
    activation = given.get("activation", "silu" if gated else "gelu")
    _check_choices("activation", [activation], ops.ACTIVATIONS)
    return Shape(
        tokens=given.get("tokens", 4096),
        model_dim=model_dim,
        hidden_dim=given.get("hidden_dim", model_dim),
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=factor,
        gated=gated,
        activation=activation,
    )


def _check_memory(cell: Cell) -> None:
    """Refuse what cannot fit: parameters, a copy and their gradients, rows with theirs, and fp32 scores."""
    shape = cell.shape
    rows = shape.tokens * shape.top_k * (shape.model_dim + 2 * shape.hidden_dim)
    need = DTYPES[cell.dtype].itemsize * (3 * shape.num_experts * shape.expert_size + 2 * rows)
    need += 4 * 3 * shape.tokens * shape.num_experts
    if not hasattr(os, "sysconf"):
        return
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ConfigError(
            f"--experts {shape.num_experts} --model-dim {shape.model_dim} --hidden-dim {shape.hidden_dim} "
            f"--tokens {shape.tokens}: needs about {need / 2**30:.0f} GiB, this machine has "
            f"{have / 2**30:.0f}; choose a smaller one"
        )
