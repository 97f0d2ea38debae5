"""Rows of the Tutel paper (arXiv 2206.03382), as this simulator predicts them: paper, ours, error.

One set of constants serves all of them (`flexpert.tune.presets`, "a100-ndv4"); none is fitted to a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flexpert.core.errors import ConfigError
from flexpert.core.registry import suggest

from .all_to_all import all_to_all_share, linear_against_2dh
from .memory import layer_memory
from .parallelism import adaptive_parallelism
from .pipelining import average_gain, worst_gain
from .rows import Table
from .scaling import single_layer

TABLES: dict[str, Callable[[], Table]] = {
    "T2": all_to_all_share,
    "T5": layer_memory,
    "T6a": average_gain,
    "T6b": worst_gain,
    "F12": adaptive_parallelism,
    "F14": single_layer,
    "F18": linear_against_2dh,
}


def reproduce(row: str) -> dict[str, Any]:
    """A table or figure, as plain data.

    Args:
        row: "T2" for table 2, "F14" for figure 14, and so on.

    Raises:
        ConfigError: none of `TABLES`.
    """
    names = {name.lower(): name for name in TABLES}
    if row.lower() not in names:
        raise ConfigError(f"paper: unknown row {row!r}: {suggest(row, TABLES)}")
    name = names[row.lower()]
    return {"row": name, **TABLES[name]().to_dict()}
