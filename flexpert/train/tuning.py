"""The tuner of a run: made when it starts, saved with its checkpoints, its choices logged in its folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.parallel import ExpertMesh
from flexpert.parallel.together import Ranks
from flexpert.tune import (
    Machine,
    PlanLog,
    Tuner,
    TunerSettings,
    attach,
    cost_of,
    dictionary_path,
    digest_of,
)
from flexpert.tune.calibrate import calibrate, store, stored
from flexpert.tune.one_rank import plain

_log = logging.getLogger("flexpert")

PLANS, KNOWN = "plans.jsonl", "tuner.json"  # in a run's folder: every step's plan, and what is known of plans


class Tuning:
    """The tuner of a model that is laid out over the ranks of a mesh; every rank makes one.

    The machine is measured once, which takes some seconds, and kept in the user's cache.

    Args:
        model: after `parallelize`.
        mesh: of its experts.
        dtype: that experts compute in.
        deterministic: see `TunerSettings`.

    Raises:
        ConfigError: no layer that can be tuned.
    """

    def __init__(self, model: nn.Module, mesh: ExpertMesh, dtype: torch.dtype, deterministic: bool) -> None:
        self._ranks = Ranks()
        machine = _machine(mesh, dtype, self._ranks)
        facts = {"machine": digest_of(machine)}
        self._cache = Path(self._ranks.first(lambda: str(dictionary_path(mesh, facts))))
        self.tuner = Tuner(cost_of(machine), TunerSettings(deterministic=deterministic))
        attach(model, self.tuner, machine=facts, dictionary=self._cache, dtype=dtype)
        self._folder: Path | None = None

    def begin(self, folder: Path, step: int, state: Mapping[str, Any] | None) -> None:
        """Go on after so many steps: with what a checkpoint knew, and the plans of steps that ran after it.

        Args:
            folder: of the run.
            step: number of the first step.
            state: of `state`, from the checkpoint; None without.
        """
        self._folder = folder
        if state is not None:
            self.tuner.load_state_dict(state)

        def rewind() -> list[Any]:
            self.tuner.log = PlanLog(folder / PLANS)
            cut = self.tuner.log.rewind(step)
            return [[n, {name: plan.to_dict() for name, plan in plans.items()}] for n, plans in cut.items()]

        replay = {
            number: {name: ExecutionPlan.from_dict(plan) for name, plan in plans.items()}
            for number, plans in self._ranks.first(rewind)
        }
        known = set(self.tuner.layers)
        legal = {*next(iter(self.tuner.layers.values())).plans, ExecutionPlan()}  # ranks may be others now
        ran = {plain(plan) for plans in replay.values() for plan in plans.values()}
        if all(plans.keys() == known for plans in replay.values()) and ran <= legal:
            self.tuner.replay = replay

    def step(self, number: int) -> AbstractContextManager[None]:
        """Around one step."""
        return self.tuner.step(number)

    def state(self) -> dict[str, Any]:
        """For the checkpoint; rank 0 also writes it into the run's folder, for `flexpert tune --explain`."""
        if self._ranks.rank == 0 and self._folder is not None:
            self.tuner.save(self._folder / KNOWN)
        return self.tuner.state_dict()

    def finish(self) -> None:
        """Keep what was learnt for other runs."""
        if self._ranks.rank == 0:
            self.tuner.save(self._cache)


class NoTuning:
    """Plans that stay as they are."""

    tuner: Tuner | None = None

    def begin(self, folder: Path, step: int, state: Mapping[str, Any] | None) -> None:
        """Nothing."""

    def step(self, number: int) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def state(self) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def finish(self) -> None:
        """Nothing."""


def make_tuning(
    model: nn.Module, mesh: ExpertMesh, dtype: torch.dtype, deterministic: bool
) -> Tuning | NoTuning:
    """A tuner for the model, or none where its experts are of kinds that the cost model does not know."""
    try:
        return Tuning(model, mesh, dtype, deterministic)
    except ConfigError as error:
        _log.warning("plans are not tuned, the default one runs: %s", error)
        return NoTuning()


def _machine(mesh: ExpertMesh, dtype: torch.dtype, ranks: Ranks) -> Machine:
    """The machine of these ranks: the one measured before, else measured now."""
    name = str(dtype).removeprefix("torch.")

    def read() -> str:
        machine = stored(mesh, name)
        return "" if machine is None else machine.to_json()

    text = ranks.first(read)
    if text:
        return Machine.from_json(text)
    if ranks.rank == 0:
        _log.info("measuring the ranks' machine, once, for the tuner")
    machine = calibrate(dtypes=(name,), ranks_per_node=mesh.ranks_per_node)
    ranks.first(lambda: str(store(machine)))
    return machine
