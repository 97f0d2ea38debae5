"""Carry out a plan: memory first, then times, then the files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from flexpert.core.errors import ConfigError
from flexpert.core.files import check_writable

from .implementations import DECODE, TRAINING, UnavailableError
from .machine import backends, machine_facts
from .measure import interleave, prepare, summary
from .memory import peaks
from .plan import SHARES, Cell, Plan
from .plot import plot
from .problem import DTYPES, Problem, make_problem
from .report import markdown
from .share import routing_percent

_log = logging.getLogger("flexpert")


def run_benchmark(plan: Plan) -> dict[str, Any]:
    """Measure everything the plan names.

    Returns:
        `machine`, `configs` (name to shape), `rows`, `routing` (the share of router, dispatch and combine),
        and `unavailable` (what was not measured, and why).
    """
    with _threads(1):  # so that none is started that children of a fork would miss
        _load(plan)
        memory = {id(cell): _memory(cell, plan) for cell in plan.cells}
    rows: list[dict[str, Any]] = []
    routing: list[dict[str, Any]] = []
    unavailable: list[dict[str, Any]] = []
    with _threads(plan.threads):
        machine = machine_facts()
        for cell in plan.cells:
            problem = make_problem(cell.shape, DTYPES[cell.dtype])
            for mode in cell.modes:
                _log.info("%s %s, %d tokens: %s", cell.config, cell.dtype, cell.shape.tokens, mode)
                new, share, missing = _measure(cell, problem, mode, plan, memory[id(cell)])
                rows += new
                routing += share
                unavailable += [entry for entry in missing if entry not in unavailable]
    configs = {cell.config: vars(cell.shape) for cell in plan.cells}
    return {
        "machine": machine, "configs": configs, "rows": rows, "routing": routing, "unavailable": unavailable,
    }  # fmt: skip


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(plan: Plan) -> None:
    """The native library and other packages, so that their memory is in every implementation's peak."""
    backends()
    for item in plan.implementations:
        with suppress(UnavailableError):
            item.load()


def _memory(cell: Cell, plan: Plan) -> dict[str, float | None]:
    if not plan.memory or TRAINING not in cell.modes:
        return {}
    _log.info("%s %s, %d tokens: peak memory", cell.config, cell.dtype, cell.shape.tokens)
    return peaks(cell.shape, DTYPES[cell.dtype], plan.implementations)


def _measure(
    cell: Cell, problem: Problem, mode: str, plan: Plan, memory: dict[str, float | None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """(one row per implementation, the share of routing, what cannot run)."""
    place = {"config": cell.config, "dtype": cell.dtype}
    runs, unavailable = {}, []
    for item in plan.implementations:
        if mode not in item.modes:
            continue
        try:
            runs[item.name] = prepare(item, problem, mode)
        except UnavailableError as reason:
            unavailable.append({**place, "implementation": item.name, "reason": str(reason)})
    times = interleave(runs, plan.seconds * SHARES[mode], plan.minimum)
    found = {name: summary(values) for name, values in times.items()}
    reference = "stream" if mode == DECODE else "dense"
    rows = []
    for name, figures in found.items():
        seconds = max(figures["median_ms"], 1e-6) / 1e3
        percent = round(100 * found[reference]["median_ms"] / (1e3 * seconds), 1)
        row = {**place, "mode": mode, "tokens": cell.shape.tokens, "implementation": name, **figures}
        if mode == DECODE:
            row |= {"gb_per_s": float(f"{problem.touched_bytes / seconds / 1e9:.4g}")}
        else:
            work = problem.flops * (3 if mode == TRAINING else 1)
            row |= {"gflops": float(f"{work / seconds / 1e9:.4g}")}
        row |= {f"percent_of_{reference}": percent}
        row |= {"peak_mib": memory.get(name) if mode == TRAINING else None}
        rows.append(row)
    routed = routing_percent(times, mode)
    share = {**place, "mode": mode, "tokens": cell.shape.tokens, "percent": routed}
    return rows, [] if routed is None else [share], unavailable


def check_output(stem: Path) -> None:
    """Make the folder of the results, before any work.

    Raises:
        ConfigError: they cannot be written there.
    """
    try:
        is_folder = stem.is_dir()
        stem.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(
            f"--output {stem}: {why}; give a path that can be written to, without suffix"
        ) from error
    if is_folder:
        raise ConfigError(f"--output {stem}: it is a folder; name files in it, as {stem / 'layer'}")
    try:
        for path in _files(stem):
            check_writable(path)
    except ConfigError as error:
        raise ConfigError(f"--output {stem}: {error}") from error


def _files(stem: Path) -> tuple[Path, Path, Path]:
    json_path, md_path, png_path = (
        stem.with_name(f"{stem.name}.{suffix}") for suffix in ("json", "md", "png")
    )
    return json_path, md_path, png_path


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to; the file has its own when it is complete, and the one before it till then."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        if partial.exists():
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write(result: dict[str, Any], stem: Path) -> list[Path]:
    """Write STEM.json, STEM.md and, where matplotlib is installed, STEM.png; the paths."""
    json_path, md_path, png_path = _files(stem)
    for path, text in ((json_path, json.dumps(result, indent=1) + "\n"), (md_path, markdown(result))):
        with _whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
    paths = [json_path, md_path]
    with _whole(png_path) as partial:
        drawn = plot(result, partial)
    if drawn:
        paths.append(png_path)
    else:
        _log.info("no plot without matplotlib: pip install 'flexpert[plots]'")
    return paths
