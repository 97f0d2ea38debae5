"""A whole run: folder, training, evaluation, saved model, plots, summary."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError
from flexpert.core.registry import check_options
from flexpert.core.seeding import derive_seed
from flexpert.layer import MoE
from flexpert.monitor.metrics import MetricsWriter, read_metrics

from .config import TrainConfig
from .folder import model_folder, open_run, restart_count
from .loop import fit, total_steps
from .parallel import OneRank, join


def train(config: TrainConfig, *, resume: bool = False) -> dict[str, Any] | None:
    """Train, evaluate and save; everything lies in `<output>/<name>/`.

    Started by torchrun, the ranks train one model together, on the same batches as one process would; rank 0
    alone writes and speaks. Restarted by torchrun, they go on with the run that they began, from its newest
    checkpoint.

    Args:
        config: settings.
        resume: go on with the run of this name; its settings must be the same. Without it, a name that is
            taken gets a number: nothing is overwritten.

    Returns:
        "run" (folder), "steps", "seconds" (of training), "headline" (a phrase), "plots" (files), and the
        figures of the task: "accuracy" and "images", or "validation_loss", "bits_per_byte", "bytes" and
        "sample" (a text); None on other ranks than 0.

    Raises:
        ConfigError: bad settings, or a run to resume that has others.
        DistributedError: ranks that do not meet, or one that is lost.
    """
    with join(config) as ranks:
        return _train(config, resume, ranks)


def _train(config: TrainConfig, resume: bool, ranks: OneRank) -> dict[str, Any] | None:
    _prepare(config)
    task = _task_class(config)(config, ranks=ranks)
    ranks.prepare(task.model)  # before a folder is made for what cannot run
    folder = Path(ranks.from_main(lambda: str(open_run(config, resume))))
    steps = total_steps(task, config)
    writer = None
    if ranks.world.is_main:
        together = f", {ranks.world.size} ranks" if ranks.world.size > 1 else ""
        again = f", restart {restarts}" if (restarts := restart_count()) else ""
        _say(f"run {folder}: {_describe(task.model)}{together}{again}; {task.source}")
        writer = MetricsWriter(folder)
    with _Progress(steps, task.score, silent=writer is None) as progress:
        seconds = fit(task, config, folder, writer, progress.report, ranks)
    figures = task.evaluate()
    tensors = ranks.whole(task.model)
    load = task.load() if ranks.from_main(_plotter) else {}
    if writer is None:
        return None
    writer.close()
    result = {"run": str(folder), "steps": steps, "seconds": seconds, **figures}
    _save_model(task, folder, tensors)
    result |= {"headline": task.headline(figures), **task.closing(folder / "model")}
    result["plots"] = [str(path) for path in _plots(folder, task.score, figures[task.score], load)]
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def evaluate(folder: Path, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a run's saved model on held-out data.

    Args:
        folder: of the run.
        overrides: "top_k" and "capacity_factor", in place of the model's own.

    Returns:
        The figures of the task (see `train`), "headline", "seconds", "routing" (the overrides) and, with MoE
        layers, "drop_rate"; None on other ranks than 0.

    Raises:
        ConfigError: no such run, no saved model, or an unknown override.
    """
    check_options("evaluate", overrides, ("top_k", "capacity_factor"))
    saved, config = model_folder(folder)
    config = dataclasses.replace(config, ranks=None)  # any number evaluates
    _prepare(config)
    with join(config) as ranks:
        task = _task_class(config).from_saved(config, saved, ranks)
        if overrides and not any(isinstance(module, MoE) for module in task.model.modules()):
            raise ConfigError(f"{folder} is a dense model: {', '.join(overrides)} would change nothing")
        began = time.perf_counter()
        figures = task.evaluate(RoutingContext(**overrides))
        if not ranks.world.is_main:
            return None
    return {
        **figures,
        "headline": task.headline(figures),
        "seconds": round(time.perf_counter() - began, 3),
        "routing": overrides,
        "run": str(folder),
    }


def _say(text: str) -> None:
    """A line for the person who waits; standard output is for results."""
    sys.stderr.write(f"{text}\n")


def _prepare(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(derive_seed(config.seed, "run"))


def _task_class(config: TrainConfig) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"the {config.task} model needs transformers: pip install 'flexpert[hf]'")
    if config.task == "language":
        from .language import LanguageTask

        return LanguageTask
    from .vision import VisionTask

    return VisionTask


def _save_model(task: Any, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `model/` beside its final name, then rename: a reader never sees half a model."""
    fresh, final = folder / "model.tmp", folder / "model"
    shutil.rmtree(fresh, ignore_errors=True)
    task.save(fresh, tensors)
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)


def _describe(model: torch.nn.Module) -> str:
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    params = sum(p.numel() for p in model.parameters())
    if not layers:
        return f"{params / 1e6:.2f} M parameters, no MoE layer"
    saved = sum(sum(p.numel() for p in m.parameters()) - m.num_active_params() for m in layers)
    active = params - saved
    return f"{params / 1e6:.2f} M parameters ({active / 1e6:.2f} M active), {len(layers)} MoE layers"


def _plotter() -> str:
    """What draws plots, or nothing."""
    return "matplotlib" if importlib.util.find_spec("matplotlib") else ""


def _plots(folder: Path, name: str, score: float, load: Mapping[str, list[float]]) -> list[Path]:
    if not _plotter():
        _say("no plots: pip install 'flexpert[plots]' draws them")
        return []
    from flexpert.monitor.plots import learning_curve, load_map

    curve = folder / "learning_curve.png"
    learning_curve(read_metrics(folder), curve, name, score)
    if not load:
        return [curve]
    load_map(load, folder / "load.png")
    return [curve, folder / "load.png"]


class _Progress:
    """A bar on a terminal, plain lines elsewhere; on standard error, so that results stay apart."""

    def __init__(self, steps: int, score: str, *, silent: bool = False) -> None:
        self._score = score
        hidden = silent or not sys.stderr.isatty()
        self._bar = tqdm(total=steps, unit="step", file=sys.stderr, disable=hidden)
        self._slow = ""  # the rank and phase that were named last

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def report(self, line: dict[str, Any]) -> None:
        """Show one line of metrics; a slow rank once, until another one or none is named."""
        straggler = line.get("straggler", "")
        slow = straggler.partition(":")[0]
        if slow and slow != self._slow:
            tqdm.write(straggler, file=sys.stderr)
        self._slow = slow
        parts = [
            f"loss {line['loss']:.4f}",
            f"{self._score.replace('_', ' ')} {line.get(self._score, 0):.3f}",
            f"{line['tokens_per_second'] / 1000:.1f}k tokens/s",
        ]
        if "load" in line:
            busiest = max(max(shares) * len(shares) for shares in line["load"].values())
            parts += [f"busiest expert {busiest:.1f}x", f"dropped {line['drop_rate']:.1%}"]
        text = ", ".join(parts)
        if self._bar.disable:
            _say(f"step {line['step']}/{line['steps']} ({line['seconds']:.0f} s): {text}")
        else:
            self._bar.set_postfix_str(text)
            self._bar.update(line["step"] - self._bar.n)
